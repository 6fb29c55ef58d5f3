"""Files of models and runs: safetensors and JSON, checked before anything is built from them."""
