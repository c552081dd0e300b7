"""attnlang: a compiler for attention."""
