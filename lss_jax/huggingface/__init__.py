"""Hugging Face folders: families of models as `transformers` names them, in and out."""
