"""GGUF files (llama.cpp, Ollama): header, dequantised tensors and tokenizer; knows no model family.

A file may come from anywhere: every count and size is compared with the file's size before anything
is allocated, and every mistake is a sentence that names the file.
"""

from ntkrl.gguf.header import GgufFile, StoredTensor, is_gguf, read_header
from ntkrl.gguf.tensors import block_sizes, read_tensor, same_bytes, tensor_names_of, type_name
from ntkrl.gguf.tokenizer import end_tokens, special_token_ids, write_tokenizer
