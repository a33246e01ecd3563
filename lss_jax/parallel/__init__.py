"""The mesh, the token order, the gradient law, and what works across devices outside attention."""
