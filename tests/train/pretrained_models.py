"""Small random models, saved as ``transformers`` saves the large ones; and a CAM++ of made-up weights."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

from seedvc_train.features.campplus import CampplusNetwork

WHISPER_DIM, XLSR_DIM, XLSR_LAYERS, WINDOW = 16, 24, 4, 2


def save_whisper(folder: Path, window: int = WINDOW) -> Path:
    """A Whisper of two encoder layers, which takes ``window`` seconds."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=WHISPER_DIM,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_source_positions=50 * window,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    _save(WhisperForConditionalGeneration, config, folder)
    WhisperFeatureExtractor(chunk_length=window).save_pretrained(folder)
    return folder


def save_xlsr(folder: Path, *, normalize: bool = True, stable: bool = True) -> Path:
    """A wav2vec 2.0 of four layers with the heads of pretraining, as XLS-R is published."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

    config = Wav2Vec2Config(
        hidden_size=XLSR_DIM,
        num_hidden_layers=XLSR_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        conv_bias=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=stable,
        feat_extract_norm="layer" if stable else "group",
        codevector_dim=8,
        proj_codevector_dim=8,
        vocab_size=32,
    )
    _save(Wav2Vec2ForPreTraining, config, folder)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    extractor.save_pretrained(folder)
    return folder


def save_campplus(path: Path) -> Path:
    """A CAM++ whose weights follow from their names."""
    network = CampplusNetwork()
    torch.save({name: made_up(name, tensor) for name, tensor in network.state_dict().items()}, path)
    return path


def save_rmvpe(
    path: Path, weight: np.ndarray | None = None, *, bins: int = 128, classes: int = 360, block: int = 32
) -> str:
    """An ONNX file of RMVPE's interface whose network is one matrix and a sigmoid; it takes whole blocks of frames."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if weight is None:
        weight = np.random.default_rng(0).standard_normal((bins, classes)).astype(np.float32) / 4
    nodes = [
        helper.make_node("Reshape", ["mel", "blocks"], ["blocked"]),
        helper.make_node("Reshape", ["blocked", "whole"], ["heard"]),
        helper.make_node("Transpose", ["heard"], ["frames"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["frames", "weight"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["salience"]),
    ]
    graph = helper.make_graph(
        nodes,
        "rmvpe",
        [helper.make_tensor_value_info("mel", TensorProto.FLOAT, [1, bins, "frames"])],
        [helper.make_tensor_value_info("salience", TensorProto.FLOAT, [1, "frames", classes])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([1, bins, -1, block]), "blocks"),
            numpy_helper.from_array(np.array([1, bins, -1]), "whole"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return str(path)


def made_up(name: str, like: torch.Tensor) -> torch.Tensor:
    """Uniform values from the name alone, at a scale at which what goes in still tells in what comes out."""
    if not like.is_floating_point():
        return torch.zeros_like(like)
    values = np.random.default_rng(zlib.crc32(name.encode())).random(like.numel())
    if like.dim() > 1:
        edge = (6 / like[0].numel()) ** 0.5  # variance 2 / inputs: He's, for layers before a ReLU
        low, high = -edge, edge
    else:
        low, high = (0.7, 1.3) if name.endswith(("running_var", "weight")) else (-0.2, 0.2)
    return torch.from_numpy(low + (high - low) * values).float().reshape(like.shape)


def _save(model: type, config: object, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = model(config)
        for name, tensor in network.named_parameters():
            if tensor.dim() == 1 and "masked" not in name:  # fresh norms and biases do nothing
                torch.nn.init.normal_(tensor, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
        network.eval().save_pretrained(folder)
