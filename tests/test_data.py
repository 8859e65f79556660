"""Rows become batches: schema, truncation, mixing, order, resume, hosts, padding."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizer_folders import write_dream, write_llada

from a2d_jax import safety_rows
from a2d_jax.data import Batch, DataConfig, DataSummary, EncodedRows, Loader, collate, make_loader
from a2d_jax.losses import a2d_loss
from a2d_jax.masking import NoisedBatch
from a2d_jax.rows import read_rows
from a2d_jax.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
EOS = 99

CATEGORY = {"animal_abuse": False, "violence,aiding_and_abetting,incitement": True}
ROWS = [
    {"prompt": "How?", "response": "Mix the flour.", "category": CATEGORY, "is_safe": False, "extra": 1},
    {"prompt": "Wie spät ist es?", "response": "I can't help\n with that.", "category": CATEGORY, "is_safe": True},
    {"prompt": "How?", "response": "No.", "is_safe": True},
    {"text": "The quick brown fox.<|endoftext|>"},
    {"text": "It was 1984."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_llada(tmp_path_factory.mktemp("llada")))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def encoded_rows(lengths, prompt_lengths=None, is_safe=None, file_index=None) -> EncodedRows:
    """Rows of given lengths; every token of row i is i, so that a batch shows which rows it holds."""
    count = len(lengths)
    file_index = np.zeros(count, np.int32) if file_index is None else np.array(file_index, np.int32)
    is_safe = np.ones(count, bool) if is_safe is None else np.array(is_safe, bool)
    files = tuple((f"file{i}", int(n)) for i, n in enumerate(np.bincount(file_index)))
    kinds = (int((~is_safe).sum()), int(is_safe.sum()), 0)
    summary = DataSummary(count, *kinds, sum(lengths), 0, max(lengths), files, truncation=None)
    return EncodedRows(
        tokens=np.repeat(np.arange(count, dtype=np.int32), lengths),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_lengths=np.array(prompt_lengths if prompt_lengths is not None else [0] * count, np.int32),
        is_safe=is_safe,
        file_index=file_index,
        summary=summary,
    )


def drawn(loader, num_steps) -> list[int]:
    """Row numbers in the order in which the loader gives them (rows of `encoded_rows`)."""
    return [int(i) for step in range(num_steps) for i in loader.batch_at(step).tokens[:, 0]]


def assert_same(one: Batch, other: Batch) -> None:
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype


# ---- padding ----


def test_padding_worked_by_hand():
    encoded = encoded_rows([3, 5], prompt_lengths=[2, 1], is_safe=[True, False])
    batch = collate(encoded, np.array([0, 1]), EOS, buckets=(4, 8))
    assert batch.tokens.tolist() == [[0, 0, 0, EOS, EOS, EOS, EOS, EOS], [1, 1, 1, 1, 1, EOS, EOS, EOS]]
    # Up to the longest row (5) the padding is response; from there to the bucket (8) it is nothing.
    assert batch.is_response.astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.attention_mask.astype(int).tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] * 2
    assert batch.is_safe.tolist() == [True, False]
    assert [array.dtype for array in batch] == [np.int32, bool, bool, bool]
    exact = collate(encoded, np.array([0, 0]), EOS, buckets=(3, 8))  # a bucket as long as the longest row adds nothing
    assert exact.tokens.shape == (2, 3) and exact.attention_mask.all()


def test_rows_are_padded_with_eos_to_a_wanted_length():
    config = DataConfig(row_length=5, buckets=(6, 9), pad_to=8)
    loader = Loader(encoded_rows([3, 5], prompt_lengths=[2, 1]), config, EOS, batch_size=2, seed=0)
    batch = loader.batch_at(0)
    order = np.argsort(batch.tokens[:, 0])
    assert batch.tokens[order].tolist() == [[0] * 3 + [EOS] * 6, [1] * 5 + [EOS] * 4]
    # The eight columns are what the loss knows of; the ninth fills the bucket.
    assert batch.is_response[order].sum(axis=1).tolist() == [6, 7] and batch.attention_mask.sum(axis=1).tolist() == [
        8,
        8,
    ]
    shorter = Loader(encoded_rows([3, 5]), dataclasses.replace(config, pad_to=7), EOS, batch_size=2, seed=0)
    assert shorter.fingerprint != loader.fingerprint
    with pytest.raises(ValueError, match=r"pad_to=10 must lie between 0 and the last of buckets=\(6, 9\)"):
        dataclasses.replace(config, pad_to=10)


@pytest.mark.parametrize("objective", ["llada", "dream"])
def test_padding_and_loss_are_those_of_the_reference(objective):
    """The reference collated these rows to their longest; a larger bucket leaves answer lengths and loss alone."""
    z = np.load(FIXTURES / "a2d_loss" / f"{objective}_mixed.npz")
    lengths, (num_rows, longest) = z["row_lengths"], z["input_ids"].shape
    eos_id = json.loads((FIXTURES / f"{objective}_tiny" / "config.json").read_text())["eos_token_id"]
    encoded = EncodedRows(
        tokens=np.concatenate([row[:length] for row, length in zip(z["input_ids"], lengths, strict=True)]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_lengths=z["prompt_lengths"],
        is_safe=z["is_safe"],
        file_index=np.zeros(num_rows, np.int32),
        summary=None,
    )
    order, logits = np.arange(num_rows), np.random.default_rng(0).normal(size=(num_rows, longest + 7, 300))
    losses = []
    for bucket in (longest, longest + 7):
        batch = collate(encoded, order, eos_id, buckets=(bucket,))
        assert batch.tokens.shape == (num_rows, bucket)
        np.testing.assert_array_equal(batch.tokens[:, :longest], z["input_ids"])
        np.testing.assert_array_equal(batch.is_response.sum(1), longest - z["prompt_lengths"])
        added = [(0, 0), (0, bucket - longest)]
        noised = NoisedBatch(
            tokens=jnp.pad(z["target_ids"], added),
            noisy_tokens=jnp.pad(z["noisy_batch"], added),
            is_masked=jnp.pad(z["masked_indices"], added),
            mask_prob=jnp.pad(z["p_mask"], added, mode="edge"),
            is_response=jnp.asarray(batch.is_response),
            is_safe=jnp.asarray(batch.is_safe),
        )
        losses.append(float(a2d_loss(jnp.asarray(logits[:, :bucket], jnp.float32), noised, objective)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bucket_is_the_shortest_that_holds_the_batch():
    loader = Loader(encoded_rows([3, 9, 17, 32]), DataConfig(row_length=32), EOS, batch_size=1, seed=0)
    assert loader.buckets == (8, 16, 24, 32)
    widths = {int(batch.tokens[0, 0]): batch.tokens.shape[1] for batch in map(loader.batch_at, range(4))}
    assert widths == {0: 8, 1: 16, 2: 24, 3: 32}


# ---- order ----


def test_every_row_once_an_epoch_in_a_new_order():
    loader = Loader(encoded_rows([1] * 10), DataConfig(row_length=4), EOS, batch_size=4, seed=7)
    rows = drawn(loader, 5)  # two epochs; the third batch runs across the end of the first
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:] and rows[:10] != list(range(10))
    assert loader.steps_per_epoch == 3
    again = Loader(encoded_rows([1] * 10), DataConfig(row_length=4), EOS, batch_size=4, seed=7)
    assert drawn(again, 5) == rows
    other = Loader(encoded_rows([1] * 10), DataConfig(row_length=4), EOS, batch_size=4, seed=8)
    assert drawn(other, 5) != rows


def test_resume_at_any_step_gives_the_same_batches(tokenizer):
    make = lambda: make_loader(ROWS, tokenizer, DataConfig(row_length=64), batch_size=2, seed=3)
    iterator = iter(make())
    states, batches = [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for step, state in enumerate(states):
        resumed = iter(make())
        resumed.set_state(state)
        for batch in batches[step:]:
            assert_same(next(resumed), batch)
    iterator.seek(10**12)
    assert_same(next(iterator), make().batch_at(10**12))
    assert iterator.get_state()["step"] == 10**12 + 1


def test_resume_on_other_data_is_refused(tokenizer):
    config = DataConfig(row_length=64)
    state = iter(make_loader(ROWS, tokenizer, config, batch_size=2, seed=3)).get_state()
    for rows, batch_size, seed in ((ROWS[:-1], 2, 3), (ROWS, 4, 3), (ROWS, 2, 4)):
        iterator = iter(make_loader(rows, tokenizer, config, batch_size, seed))
        with pytest.raises(ValueError, match="data at step 0 were others.*Resume with the row files"):
            iterator.set_state(state)


def test_hosts_make_up_the_global_batch():
    encoded = encoded_rows([1, 2, 3, 11, 5, 6, 7], prompt_lengths=[0, 1, 2, 3, 4, 5, 6], is_safe=[1, 0, 1, 0, 1, 0, 1])
    config = DataConfig(row_length=12, harmful_share=0.5)
    whole = Loader(encoded, config, EOS, batch_size=4, seed=1)
    for count in (2, 4):
        hosts = [Loader(encoded, config, EOS, 4, 1, rows) for rows in np.split(np.arange(4), count)]
        assert {host.fingerprint for host in hosts} == {whole.fingerprint}
        for step in range(6):
            parts = [host.batch_at(step) for host in hosts]
            assert_same(Batch(*map(np.concatenate, zip(*parts, strict=True))), whole.batch_at(step))


# ---- mixing ----


def test_harmful_share_is_exact_in_every_cycle():
    encoded = encoded_rows([1] * 30, is_safe=[i >= 3 for i in range(30)])  # 3 harmful, 27 retain
    loader = Loader(encoded, DataConfig(row_length=4, harmful_share=0.7), EOS, batch_size=10, seed=0)
    for step in range(6):
        assert (~loader.batch_at(step).is_safe).sum() == 7
    rows = Counter(drawn(loader, 9))  # 63 harmful draws = 21 epochs of 3, 27 retain draws = 1 epoch of 27
    assert [rows[i] for i in range(3)] == [21] * 3 and [rows[i] for i in range(3, 30)] == [1] * 27


def test_weights_of_files():
    encoded = encoded_rows([1] * 12, file_index=[0] * 2 + [1] * 10)
    loader = Loader(encoded, DataConfig(row_length=4, weights=(1, 3)), EOS, batch_size=4, seed=0)
    for step in range(8):  # a quarter of each batch, although the first file holds a sixth of the rows
        assert sum(i < 2 for i in loader.batch_at(step).tokens[:, 0]) == 1


def test_weights_and_share_together():
    # File 0: 2 harmful, 2 retain. File 1: 4 retain. Harmful draws are all of file 0, the others follow the weights.
    encoded = encoded_rows([1] * 8, is_safe=[0, 0, 1, 1, 1, 1, 1, 1], file_index=[0, 0, 0, 0, 1, 1, 1, 1])
    loader = Loader(encoded, DataConfig(row_length=4, weights=(1, 3), harmful_share=0.2), EOS, batch_size=10, seed=0)
    kinds = Counter("harmful" if i < 2 else "retain 0" if i < 4 else "retain 1" for i in drawn(loader, 2))
    assert kinds == {"harmful": 4, "retain 0": 4, "retain 1": 12}


def test_odd_weights_come_out_right_over_many_draws():
    encoded = encoded_rows([1] * 4, file_index=[0, 1, 2, 3])
    weights = (1, np.pi, 0.001, 7)
    loader = Loader(encoded, DataConfig(row_length=4, weights=weights), EOS, batch_size=1000, seed=0)
    counts = Counter(drawn(loader, 20))
    np.testing.assert_allclose([counts[i] / 20_000 for i in range(4)], np.array(weights) / sum(weights), atol=1e-4)


def test_pool_of_tiny_share_gets_one_turn_a_cycle():
    encoded = encoded_rows([1] * 2, file_index=[0, 1])
    loader = Loader(encoded, DataConfig(row_length=4, weights=(1e-9, 1)), EOS, batch_size=1000, seed=0)
    assert drawn(loader, 10).count(0) == 1


# ---- rows to tokens ----


def test_rows_become_prompt_response_end(tokenizer, tmp_path_factory):
    dream = load_tokenizer(write_dream(tmp_path_factory.mktemp("dream")))
    for tok in (tokenizer, dream):
        batch = make_loader(ROWS[:1], tok, DataConfig(row_length=96, buckets=(96,)), batch_size=1, seed=0).batch_at(0)
        prompt, response = tok.encode_prompt("How?"), [*tok.encode("Mix the flour."), tok.eot_id, tok.eos_id]
        end = len(prompt) + len(response)
        assert batch.tokens[0].tolist() == prompt + response + [tok.eos_id] * (96 - end)
        assert np.flatnonzero(batch.is_response[0]).tolist() == list(range(len(prompt), end))
        assert batch.attention_mask[0].sum() == end
        assert batch.is_safe.tolist() == [False]


def test_documents_are_all_response_and_end_with_one_eos(tokenizer):
    for row in ROWS[3:]:
        batch = make_loader([row], tokenizer, DataConfig(row_length=64), batch_size=1, seed=0).batch_at(0)
        length = int(batch.attention_mask.sum())
        text = tokenizer.decode(batch.tokens[0, :length])
        assert text == row["text"].removesuffix("<|endoftext|>") + "<|endoftext|>"
        assert batch.is_response[0, :length].all() and batch.is_safe.all()


def test_long_responses_are_cut_and_counted(tokenizer):
    row = {"prompt": "How?", "response": "Mix the flour with butter. " * 20, "is_safe": True}
    prompt, full = tokenizer.encode_turns([(row["prompt"], row["response"])])[0]
    loader = make_loader([ROWS[2], row], tokenizer, DataConfig(row_length=40), batch_size=2, seed=0)
    report = loader.summary.truncation
    assert (report.num_cut, report.num_tokens_cut, report.num_dropped) == (1, len(prompt) + len(full) - 40, 0)
    assert report.examples == ("rows[1]",)
    batch = loader.batch_at(0)
    assert prompt + full[: 40 - len(prompt)] in batch.tokens.tolist()
    assert "1 rows cut" in str(loader.summary) and "rows[1]" in str(loader.summary)


def test_long_prompts_are_an_error_or_dropped_and_counted(tokenizer, tmp_path):
    long = {"prompt": "How do I mix the flour? " * 10, "response": "Mix.", "is_safe": False}
    file = write_lines(tmp_path / "rows.jsonl", [ROWS[2], long])
    needed = len(tokenizer.encode_prompt(long["prompt"])) + 3
    config = DataConfig(row_length=needed - 1, min_response=3)
    with pytest.raises(ValueError, match=rf"1 prompts .* min_response=3 .*rows.jsonl:2\. Use row_length={needed}, or"):
        make_loader([file], tokenizer, config, batch_size=1, seed=0)
    make_loader([file], tokenizer, DataConfig(row_length=needed, min_response=3), batch_size=1, seed=0)

    config = DataConfig(row_length=needed - 1, min_response=3, on_long_prompt="drop")
    summary = make_loader([file], tokenizer, config, batch_size=1, seed=0).summary
    assert (summary.num_rows, summary.num_harmful, summary.truncation.num_dropped) == (1, 0, 1)
    assert "1 dropped for a long prompt; first: " in str(summary) and "rows.jsonl:2" in str(summary)
    with pytest.raises(ValueError, match="none of 1 rows fits"):
        make_loader([long], tokenizer, config, batch_size=1, seed=0)


def test_summary_counts(tokenizer, tmp_path):
    files = [write_lines(tmp_path / "chat.jsonl", ROWS[:3]), write_lines(tmp_path / "text.jsonl", ROWS[3:])]
    loader = make_loader(files, tokenizer, DataConfig(row_length=64), batch_size=5, seed=0)
    summary, batch = loader.summary, loader.batch_at(0)
    assert (summary.num_rows, summary.num_harmful, summary.num_retain, summary.num_documents) == (5, 1, 4, 2)
    assert summary.rows_per_file == ((files[0], 3), (files[1], 2))
    assert summary.longest_row == batch.attention_mask[0].sum()
    # All five rows are in the batch; what is not padding is the sum of the tokens.
    turns = tokenizer.encode_turns([(row["prompt"], row["response"]) for row in ROWS[:3]])
    texts = [tokenizer.end_with_eos(tokenizer.encode(row["text"])) for row in ROWS[3:]]
    num_response = sum(len(response) for _, response in turns) + sum(map(len, texts))
    assert summary.num_response_tokens == num_response
    assert summary.num_tokens == num_response + sum(len(prompt) for prompt, _ in turns)
    assert "no row cut" in str(summary)


# ---- files ----


def without_place(file):
    return [(r.prompt, r.response, r.text, r.is_safe, r.category) for r in file.rows]


def test_parquet_and_prepared_set_equal_json_lines(tokenizer, tmp_path):
    lines = write_lines(tmp_path / "rows.jsonl", ROWS)
    columns = {key: [row.get(key) for row in ROWS] for key in ("prompt", "response", "category", "is_safe", "text")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    prepared = str(safety_rows.prepare([lines], tmp_path / "sets"))
    expected = without_place(read_rows(lines))
    assert expected[0] == ("How?", "Mix the flour.", None, False, CATEGORY)
    assert without_place(read_rows(tmp_path / "rows.parquet")) == expected
    assert without_place(read_rows(prepared)) == expected

    config = DataConfig(row_length=64)
    sources = [lines, str(tmp_path / "rows.parquet"), prepared]
    loaders = [make_loader([source], tokenizer, config, batch_size=3, seed=5) for source in sources]
    for step in range(3):
        for loader in loaders[1:]:
            assert_same(loader.batch_at(step), loaders[0].batch_at(step))
    assert "tensorflow" not in sys.modules


def test_names_of_other_rows_categories_are_left_out(tmp_path):
    """Parquet gives every row all names, with null for those that it lacks."""
    rows = [ROWS[2] | {"category": category} for category in ({"a": True}, {"b": False}, {}, None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    categories = [row.category for row in read_rows(tmp_path / "rows.parquet").rows]
    assert categories == [{"a": True}, {"b": False}, None, None]


def test_prepared_set_follows_its_files(tmp_path):
    lines = tmp_path / "rows.jsonl"
    first = safety_rows.prepare([write_lines(lines, ROWS)], tmp_path / "sets")
    assert safety_rows.prepare([lines], tmp_path / "sets") == first
    second = safety_rows.prepare([write_lines(lines, ROWS[:2]), tmp_path / "rows.jsonl"], tmp_path / "sets")
    assert second != first
    assert (len(read_rows(first).rows), len(read_rows(second).rows)) == (5, 4)


def test_program_writes_a_prepared_set(tmp_path):
    lines, sets = write_lines(tmp_path / "rows.jsonl", ROWS), str(tmp_path / "sets")
    command = [sys.executable, "-m", "a2d_jax.safety_rows", "--files", lines, "--data_dir", sets]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    last_line = run.stdout.splitlines()[-1]
    assert last_line.startswith("5 rows in ")
    assert len(read_rows(last_line.removeprefix("5 rows in ")).rows) == 5


def test_prepared_set_of_broken_rows_is_refused_and_not_left_behind(tmp_path):
    lines = tmp_path / "rows.jsonl"
    write_lines(lines, [*ROWS, {"prompt": "How?"}])
    with pytest.raises(ValueError, match="rows.jsonl:6: missing key 'response', 'is_safe'"):
        safety_rows.prepare([lines], tmp_path / "sets")
    assert not list((tmp_path / "sets").rglob("dataset_info.json"))
    with pytest.raises(ValueError, match="is no prepared data set"):
        read_rows(tmp_path / "sets")
    with pytest.raises(ValueError, match="no row file at .*missing.jsonl"):
        safety_rows.prepare([tmp_path / "missing.jsonl"], tmp_path / "sets")
    with pytest.raises(ValueError, match="no row files given"):
        safety_rows.prepare([], tmp_path / "sets")


# ---- bad input ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "response": ', "not a line of JSON"),
        ('"a string"', "must be an object with keys, not str"),
        ('{"prompt": "a", "is_safe": true}', r"missing key 'response' \(given: \['is_safe', 'prompt'\]\)"),
        ('{"prompt": "a", "response": "b"}', "missing key 'is_safe'"),
        ('{"prompt": "a", "response": null, "is_safe": true}', "missing key 'response'"),
        ('{"prompt": "a", "response": " \\n", "is_safe": false}', "the response is empty"),
        ('{"prompt": 3, "response": "b", "is_safe": true}', r"'prompt' must be a str, not int \(3\)"),
        ('{"prompt": "a", "response": ["b"], "is_safe": true}', "'response' must be a str, not list"),
        ('{"prompt": "a", "response": "b", "is_safe": "false"}', r"'is_safe' must be a bool, not str \('false'\)"),
        ('{"prompt": "a", "response": "b", "is_safe": 1}', "'is_safe' must be a bool, not int"),
        ('{"prompt": "a", "response": "b", "is_safe": true, "category": {"x": 1}}', "'category' must map names"),
        ('{"text": "  "}', "the text is empty"),
        ('{"text": 5}', "'text' must be a str, not int"),
        ('{"text": "a", "response": "b"}', "has 'text' and .'response'.; a row is either"),
        ('{"text": "a", "is_safe": false}', "is_safe is False in a document"),
        (
            '{"prompt": "hi \\ud83d", "response": "b", "is_safe": true}',
            "'prompt': .*half of a character",
        ),
    ],
)
def test_broken_rows_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:3: .*{message}"):
        read_rows(path)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\ufeff" + json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    (row,) = read_rows(tmp_path / "rows.jsonl").rows
    assert row.prompt == ROWS[0]["prompt"]


def test_broken_files(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xfc"}\n')
    with pytest.raises(ValueError, match="latin.jsonl:2: not a line of JSON"):
        read_rows(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_rows(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[0], {"prompt": "a"}]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet: row 1: missing key 'response', 'is_safe'"):
        read_rows(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="unknown format of .*rows.csv"):
        (tmp_path / "rows.csv").touch()
        read_rows(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="no rows at .*missing.jsonl"):
        read_rows(tmp_path / "missing.jsonl")


def test_mask_tokens_in_responses_are_refused(tokenizer):
    rows = [ROWS[0], {"prompt": "<|mdm_mask|>", "response": "a<|mdm_mask|>", "is_safe": True}, {"text": "<|mdm_mask|>"}]
    with pytest.raises(ValueError, match=r"2 responses or texts hold the mask token .* first: rows\[1\], rows\[2\]"):
        make_loader(rows, tokenizer, DataConfig(), batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"row_length": 0}, "row_length=0 .* must be 1 or more"),
        ({"min_response": 0}, "min_response=0 must be 1 or more"),
        ({"buckets": (64, 32, 128)}, "must grow and end at row_length=128"),
        ({"buckets": (64, 96)}, "must grow and end at row_length=128"),
        ({"on_long_prompt": "cut"}, "use 'error' or 'drop'"),
        ({"weights": (1.0, 0.0)}, "must be above 0"),
        ({"harmful_share": 1.0}, "must lie between 0 and 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_settings_that_do_not_fit_the_data(tokenizer):
    two_files = encoded_rows([1, 1], file_index=[0, 1])
    with pytest.raises(ValueError, match="3 weights .* for 2 files"):
        Loader(two_files, DataConfig(weights=(1, 1, 1)), EOS, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="needs harmful and retain rows, but there are 0 harmful and 2 retain"):
        Loader(two_files, DataConfig(harmful_share=0.5), EOS, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="file0 has weight 1, but no row of it fits"):
        Loader(encoded_rows([1], file_index=[1]), DataConfig(weights=(1, 2)), EOS, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="batch_size=0; a batch has at least 1 row"):
        Loader(two_files, DataConfig(), EOS, batch_size=0, seed=0)
    for data in ([], "rows.jsonl"):
        with pytest.raises(ValueError, match="give a list of row files"):
            make_loader(data, tokenizer, DataConfig(), batch_size=1, seed=0)
