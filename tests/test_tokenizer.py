"""Tokenizers are read from files alone and agree with transformers; special ids come from the files."""

import json
import shutil
import socket

import numpy as np
import pytest
import transformers
from tokenizer_folders import (
    CHATML_TEMPLATE,
    LLADA_TEMPLATE,
    SENTENCES,
    write_dream,
    write_json,
    write_llada,
    write_llama2,
)

from a2d_jax.tokenizer import load_tokenizer

TEXTS = [
    *SENTENCES,
    "don't  stop\r\n\n  now\t!",
    "  leading , I ca n't .",
    "ﬁ ① Ⅳ e\u0301 decomposed",
    "12345",
    "",
    "emoji 🙂 <|endoftext|><tool_call>",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    writers = {"llada": write_llada, "dream": write_dream, "llama": write_llama2}
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in writers.items()}


@pytest.fixture(scope="module")
def llada(folders):
    return load_tokenizer(folders["llada"])


@pytest.fixture(scope="module")
def dream(folders):
    return load_tokenizer(folders["dream"])


@pytest.fixture(scope="module")
def llama(folders):
    return load_tokenizer(folders["llama"], requires_mask=False)


@pytest.fixture(scope="module")
def references(folders, tmp_path_factory):
    """The same files as transformers reads them; Dream's as the Qwen2 tokenizer that its code derives from."""
    qwen2 = tmp_path_factory.mktemp("qwen2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folders["dream"] / name, qwen2)
    settings = json.loads((folders["dream"] / "tokenizer_config.json").read_text())
    del settings["auto_map"]
    write_json(qwen2 / "tokenizer_config.json", settings | {"tokenizer_class": "Qwen2Tokenizer"})
    auto = {name: transformers.AutoTokenizer.from_pretrained(folders[name]) for name in ("llada", "llama")}
    return auto | {"dream": transformers.AutoTokenizer.from_pretrained(qwen2)}


@pytest.mark.parametrize("name", ["llada", "dream", "llama"])
def test_same_ids_and_text_as_transformers(name, request, references):
    ours, theirs = request.getfixturevalue(name), references[name]
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(np.array(ids, np.int32)) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        without_special = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=True) == without_special
    chat = [{"role": "user", "content": SENTENCES[0]}]
    prompt = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert ours.encode_prompt(SENTENCES[0]) == theirs(prompt, add_special_tokens=False)["input_ids"]


def test_special_ids_come_from_the_files(llada, dream, llama):
    for tokenizer, bos, eos, pad, mask, eot in (
        (llada, "<|startoftext|>", "<|endoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>"),
        (dream, "<|beginoftext|>", "<|endoftext|>", "<|endoftext|>", "<|mask|>", "<|im_end|>"),
        (llama, "<s>", "</s>", "</s>", None, "</s>"),
    ):
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.eot_id)
        names = [None if i is None else tokenizer.hf.convert_ids_to_tokens(i) for i in ids]
        assert names == [bos, eos, pad, mask, eot]
    assert llada.vocab_size == llada.mask_id + 1  # the mask is the last token added


def test_no_code_of_the_folder_runs_and_no_network_is_used(folders, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_tokenizer(folders["dream"]).encode_turns([("a", "b")])
    assert not (folders["dream"] / "code_ran").exists()


def test_turns_end_with_end_of_turn_and_eos(llada, dream, llama):
    for tokenizer in (llada, dream):
        [(prompt, response)] = tokenizer.encode_turns([("How? ", "Mix the flour.")])
        assert prompt == tokenizer.encode_prompt("How? ")
        assert response == [*tokenizer.encode("Mix the flour."), tokenizer.eot_id, tokenizer.eos_id]
    # LLaMA 2 ends the turn with [EOS] itself: once, not twice.
    [(prompt, response)] = llama.encode_turns([("How?", "Mix the flour.")])
    assert prompt == llama.encode("<s>[INST] How? [/INST]")
    assert response.count(llama.eos_id) == 1 and response[-1] == llama.eos_id
    assert llama.decode(response[:-1]).strip() == "Mix the flour."


def test_end_of_turn_is_a_special_token(folders, tmp_path):
    shutil.copytree(folders["dream"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        CHATML_TEMPLATE.replace("'<|im_end|>' + ", "'<tool_call><|im_end|>' + ")
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eot_id == tokenizer.encode("<|im_end|>")[0]


def test_end_of_turn_inside_a_response_does_not_cut_it(llada):
    [(_, response)] = llada.encode_turns([("Say it", "first<|eot_id|>second")])
    assert llada.decode(response) == "first<|eot_id|>second<|eot_id|><|endoftext|>"


def test_template_that_always_opens_the_next_turn(folders, tmp_path):
    """LLaMA 3's first template wrote the assistant's header unasked; the response still ends at its end of turn."""
    shutil.copytree(folders["llada"], tmp_path, dirs_exist_ok=True)
    always = LLADA_TEMPLATE.replace("{% if add_generation_prompt %}", "{% if true %}")
    (tmp_path / "chat_template.jinja").write_text(always)
    tokenizer = load_tokenizer(tmp_path)
    [(_, response)] = tokenizer.encode_turns([("How?", "Mix.")])
    assert response == [*tokenizer.encode("Mix."), tokenizer.eot_id, tokenizer.eos_id]


@pytest.mark.parametrize(
    "day",
    [
        # LLaMA 3.2's and Mistral Small 3's way.
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "{% endif %}{{ date_string }}",
        "{% set today = strftime_now('%d %b %Y') %}{{ today }}",
    ],
)
def test_prompts_do_not_change_at_midnight(folders, tmp_path, day):
    shutil.copytree(folders["llada"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(day + LLADA_TEMPLATE)
    assert load_tokenizer(tmp_path).render_prompt("How?").startswith("26 Jul 2024<|startoftext|>")


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_mask_runs(name, request):
    tokenizer = request.getfixturevalue(name)
    mask = tokenizer.mask_id
    ids = tokenizer.encode_template("Mix<mask:3> then<mask:12>")
    assert ids == [*tokenizer.encode("Mix"), *[mask] * 3, *tokenizer.encode(" then"), *[mask] * 12]

    # Inside the user's turn: the text around the runs, and the template around the text, are as they are without masks.
    prompt = tokenizer.encode_prompt("Step 1: <mask:4>\nStep 2:<mask:2>", response_start="Sure<mask:1>")
    mask_text = tokenizer.decode([mask])
    expected = tokenizer.render_prompt(f"Step 1: {mask_text * 4}\nStep 2:{mask_text * 2}") + "Sure" + mask_text
    assert tokenizer.decode(prompt) == expected
    assert prompt.count(mask) == 7


def test_a_text_that_was_cut_in_a_character_is_named(llada):
    with pytest.raises(ValueError, match="half of a character, .*behind 'How '"):
        llada.encode("How \ud83d")


def test_wrong_runs_of_masks_are_named(llada, llama):
    for text in ("<mask:0>", "<mask:two>", "<mask:>"):
        with pytest.raises(ValueError, match="no run of masks; write <mask:N>"):
            llada.encode_template(text)
    for text in ("<mask:100001>", "<mask:99999999999999999999>"):
        with pytest.raises(ValueError, match="too long a run of masks; N is at most 100000"):
            llada.encode_template(text)
    with pytest.raises(ValueError, match="has none; write <mask:N>"):
        llada.encode_template("nothing to fill")
    with pytest.raises(ValueError, match="this model has none"):
        llama.encode_prompt("<mask:2>")


def _change(folder, name, **keys):
    path = folder / name
    content = json.loads(path.read_text())
    content = {key: value for key, value in (content | keys).items() if value is not None}
    write_json(path, content)


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("config.json", {"embedding_size": 300}, "wrong vocabulary .* 300 embedding rows"),
        ("config.json", {"mask_token_id": 350}, "wrong vocabulary .* mask_token_id 350"),
        ("config.json", {"mask_token_id": 40}, "wrong vocabulary .* no special token"),
        ("config.json", {"mask_token_id": None}, "no mask token; .* mask_token_id in config.json"),
        ("config.json", {"eos_token_id": 3000}, "wrong vocabulary .* eos_token_id 3000"),
        ("tokenizer_config.json", {"mask_token": "<|eot_id|>"}, "config.json has mask_token_id .* tokenizer_config"),
        ("tokenizer_config.json", {"pad_token": "<|other|>"}, "wrong vocabulary .* pad_token '<|other|>'"),
    ],
)
def test_tokenizer_that_does_not_fit_the_model(folders, tmp_path, file, keys, message):
    shutil.copytree(folders["llada"], tmp_path, dirs_exist_ok=True)
    _change(tmp_path, file, **keys)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        load_tokenizer(tmp_path)


def test_added_token_under_another_id(folders, tmp_path):
    shutil.copytree(folders["dream"], tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    decoder = settings["added_tokens_decoder"]
    decoder["999"] = decoder.pop(max(decoder))
    write_json(tmp_path / "tokenizer_config.json", settings)
    with pytest.raises(ValueError, match="should have id 999"):
        load_tokenizer(tmp_path)


def test_models_without_mask_or_template(folders, tmp_path):
    assert load_tokenizer(folders["llama"]).mask_id is None  # a causal model needs none
    with pytest.raises(ValueError, match="no mask token"):
        load_tokenizer(folders["llama"], requires_mask=True)
    shutil.copytree(folders["llada"], tmp_path, dirs_exist_ok=True)
    _change(tmp_path, "tokenizer_config.json", chat_template=None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eot_id is None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.encode_prompt("How?")


def test_older_and_newer_places_of_the_same_settings(folders, tmp_path):
    """Older folders have added_tokens.json and special_tokens_map.json; newer ones several templates, or a file."""
    dream = load_tokenizer(folders["dream"])
    shutil.copytree(folders["dream"], tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {token["content"]: int(i) for i, token in settings.pop("added_tokens_decoder").items()}
    write_json(tmp_path / "added_tokens.json", added)
    names = ("bos_token", "eos_token", "pad_token", "mask_token")
    write_json(tmp_path / "special_tokens_map.json", {name: {"content": settings.pop(name)} for name in names})
    settings["chat_template"] = [{"name": "other", "template": "x"}, {"name": "default", "template": LLADA_TEMPLATE}]
    write_json(tmp_path / "tokenizer_config.json", settings)
    named = load_tokenizer(tmp_path)
    assert "start_header_id" in named.render_prompt("a")
    (tmp_path / "chat_template.jinja").write_text(dream.hf.chat_template)
    older = load_tokenizer(tmp_path)
    assert older.encode_turns([("How?", "Mix.")]) == dream.encode_turns([("How?", "Mix.")])
    assert (older.mask_id, older.eos_id, older.eot_id) == (dream.mask_id, dream.eos_id, dream.eot_id)


def test_folders_that_are_no_tokenizer(folders, tmp_path):
    with pytest.raises(ValueError, match="no folder .*nothing is downloaded"):
        load_tokenizer("GSAI-ML/LLaDA-8B-Instruct")
    with pytest.raises(ValueError, match="needs tokenizer.json, or vocab.json and merges.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: not JSON"):
        load_tokenizer(tmp_path)


def test_template_whose_prompt_is_no_start_of_the_turn(folders, tmp_path):
    shutil.copytree(folders["llada"], tmp_path, dirs_exist_ok=True)
    thinking = LLADA_TEMPLATE.replace("assistant<|end_header_id|>\n\n'", "assistant<|end_header_id|>\n\n<think>'")
    (tmp_path / "chat_template.jinja").write_text(thinking)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="does not begin like its prompt"):
        tokenizer.encode_turns([("How?", "Mix.")])
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        load_tokenizer(tmp_path)
