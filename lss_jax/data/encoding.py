def encode(files, out, tokenizer, *, fields, separator, progress):
    raise NotImplementedError
