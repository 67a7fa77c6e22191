"""A Llama small enough for a test, made without torch: random weights, a tokeniser trained on the spot."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_TEXT = "The quick brown fox asks a question and the lazy dog answers it in plain words. 0123456789\n"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(vocab_text: str = VOCAB_TEXT, vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE that adds `<s>` in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocab_text.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_tiny_model(
    directory: Path,
    *,
    vocab_text: str = VOCAB_TEXT,
    vocab_size: int = 512,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    max_positions: int = 512,
    chat_template: str | None = None,
    seed: int = 0,
    spread: float = 0.05,
) -> Path:
    """Writes what `from_pretrained` of transformers reads: config, weights (float32) and tokeniser."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(vocab_text, vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "model_max_length": max_positions,
    }
    if chat_template:
        settings["chat_template"] = chat_template
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file(_weights(vocab, hidden, layers, seed, spread), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _weights(vocab: int, hidden: int, layers: int, seed: int, spread: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, spread, (rows, columns)).astype(np.float32)

    ones = np.ones(hidden, dtype=np.float32)
    weights = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "lm_head.weight": matrix(vocab, hidden),
        "model.norm.weight": ones,
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{prefix}.self_attn.{name}.weight"] = matrix(hidden, hidden)
        weights[f"{prefix}.mlp.gate_proj.weight"] = matrix(2 * hidden, hidden)
        weights[f"{prefix}.mlp.up_proj.weight"] = matrix(2 * hidden, hidden)
        weights[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, 2 * hidden)
        weights[f"{prefix}.input_layernorm.weight"] = ones
        weights[f"{prefix}.post_attention_layernorm.weight"] = ones
    return weights
