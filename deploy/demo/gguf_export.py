"""Write a pretrained demo model as a Q8_0 GGUF file that llama.cpp loads.

Matrices are Q8_0, norms float32. `pretrain_model.Attention` rotates neighbouring pairs as
llama.cpp does for this architecture, so its q and k rows need no permutation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, TokenType, quants
from tokenizers import Tokenizer

from deploy.demo.pretrain_model import END_ID, PAD_ID, Llama, Shape


def export(model: Llama, tokenizer: Tokenizer, path: Path) -> None:
    """Leave the model and its tokenizer in `path`."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_description(writer)
    _add_shape(writer, model.shape)
    _add_tokenizer(writer, tokenizer)
    for key, weight in model.state_dict().items():
        name = key.replace("attention.", "")
        values = weight.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            packed = quants.quantize(values.astype(np.float32), GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_description(writer: gguf.GGUFWriter) -> None:
    writer.add_name("seedwire-demo")
    writer.add_description(
        "Demo model of Seedwire, pretrained on Python documentation and public-domain books."
    )
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    tokens = [token for i in range(size) if (token := tokenizer.id_to_token(i)) is not None]
    described = cast(dict[str, Any], json.loads(tokenizer.to_str()))
    merges = [" ".join(pair) for pair in described["model"]["merges"]]
    special = {END_ID, PAD_ID}
    types = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(END_ID)
    writer.add_eos_token_id(END_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
