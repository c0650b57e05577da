"""The only code that knows Hugging Face modules: FFN families, surgery, checkpoints, loading."""
