"""Small tokenizer folders as LLaDA, Dream and LLaMA 2 ship them, trained on a few sentences; for the tests."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "Mix the flour with butter, then add two eggs and bake for 40 minutes.",
    "I can't help with that request; don't ask me how it's made.",
    "The quick brown fox jumps over the lazy dog.\nIt was 1984.",
    "Wie spät ist es? Überall déjà vu, naïve café, 你好 世界.",
]

LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _tiny_config(model_type: str, **keys: object) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": 400,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    } | keys


def write_llada(folder: Path) -> Path:
    """tokenizer.json with LLaDA's special tokens; only config.json says which one is the mask."""
    tokenizer = _byte_level_bpe()
    special = "<|startoftext|> <|endoftext|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|mdm_mask|>".split()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": LLADA_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    ids = {name: tokenizer.token_to_id(token) for name, token in (("mask", special[5]), ("eos", special[1]))}
    sizes = {"d_model": 8, "n_heads": 1, "n_layers": 1, "mlp_hidden_size": 8, "vocab_size": 340, "embedding_size": 352}
    special_ids = {"mask_token_id": ids["mask"], "eos_token_id": ids["eos"], "pad_token_id": ids["eos"]}
    write_json(folder / "config.json", {"model_type": "llada"} | sizes | special_ids)
    return folder


def write_dream(folder: Path) -> Path:
    """vocab.json + merges.txt, special tokens in tokenizer_config.json, and code that writes a file when it runs."""
    tokenizer = _byte_level_bpe()
    tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size()
    added = "<|endoftext|> <|im_start|> <|im_end|> <tool_call> <|beginoftext|> <|mask|>".split()
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {
        str(first + i): {"content": token, "special": token != "<tool_call>"} | plain for i, token in enumerate(added)
    }
    settings = {
        "added_tokens_decoder": decoder,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "unk_token": None,
        "chat_template": CHATML_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    special_ids = {"mask_token_id": first + 5, "bos_token_id": first, "eos_token_id": first, "pad_token_id": first}
    auto_map = {"AutoConfig": "tokenization_dream.DreamTokenizer"}
    write_json(folder / "config.json", _tiny_config("Dream", auto_map=auto_map, **special_ids))
    (folder / "tokenization_dream.py").write_text(
        "import pathlib\n"
        "(pathlib.Path(__file__).parent / 'code_ran').touch()\n"
        "class DreamTokenizer:\n"
        "    def __init__(self, *args, **kwargs): raise RuntimeError('code of the checkpoint ran')\n"
    )
    return folder


def write_llama2(folder: Path) -> Path:
    """tokenizer.json as sentencepiece models convert to: spaces as ▁, bytes as a fallback, <s> and </s>; no mask."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES[:3], trainer)
    # As LLaMA's file does: a plain call begins with <s>.
    start = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    write_json(folder / "tokenizer.json", data)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "chat_template": LLAMA2_TEMPLATE}
    bos = {"__type": "AddedToken", "content": "<s>", "special": True, "normalized": False}
    names = {"bos_token": bos, "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", settings | names)
    write_json(folder / "config.json", _tiny_config("llama", bos_token_id=1, eos_token_id=2))
    return folder
