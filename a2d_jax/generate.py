"""Program: chat with a checkpoint, or fill the blanks of a text that holds `<mask:N>`.

    python -m a2d_jax.generate --checkpoint DIR --prompt "What is lime?"
    python -m a2d_jax.generate --checkpoint DIR --prompt "Lime is <mask:4> made of <mask:2>." --order left_to_right

A causal model answers one token after the other and fills no masks.

A prompt without masks is a user turn of the chat template, answered in `--gen_length` tokens. A text with `<mask:N>`
(N masks) is filled as it stands; `--chat_template` puts it into a user turn first. `--prompt` may be given several
times: the prompts are decoded as one batch. The settings of `SamplerConfig` are flags. `--trace trace.html` writes one
page that replays the decoding pass by pass in any browser.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from a2d_jax.folders import hf_folder
from a2d_jax.mesh_flag import define_mesh_flag
from a2d_jax.pretrained import load_pretrained
from a2d_jax.sampler_flags import define_sampler_flags, sampler_config_from_flags
from a2d_jax.sampling import generate, infill, pad_left
from a2d_jax.sharding import make_mesh
from a2d_jax.tokenizer import has_mask_runs, load_tokenizer
from a2d_jax.trace import render_page, trace_record


def main(_) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file
    config, key = sampler_config_from_flags(given.checkpoint), jax.random.key(given.seed)
    are_templates = {has_mask_runs(prompt) for prompt in given.prompt}
    if len(are_templates) > 1:
        raise ValueError("some prompts hold <mask:N> and some do not; run the program once for each kind.")
    tokenizer = load_tokenizer(hf_folder(given.checkpoint))
    mesh = make_mesh(*given.mesh) if given.mesh else None
    model = load_pretrained(given.checkpoint, mesh, jnp.dtype(given.dtype), given.adapter)

    has_trace = given.trace is not None
    if are_templates == {True}:
        encode = tokenizer.encode_prompt if given.chat_template else tokenizer.encode_template
        inputs = [encode(prompt) for prompt in given.prompt]
        tokens, attention_mask = pad_left(inputs, tokenizer.pad_id)
        result = infill(model, tokens, config, key, attention_mask=attention_mask, trace=has_trace)
        starts = np.argmax(attention_mask, axis=1)
    else:
        prompts = [tokenizer.encode_prompt(prompt) for prompt in given.prompt]
        inputs = [prompt + [tokenizer.mask_id] * config.gen_length for prompt in prompts]
        result = generate(model, prompts, config, key, trace=has_trace)
        starts = np.full(len(prompts), result.tokens.shape[1] - config.gen_length)

    texts = [
        tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()
        for tokens, start in zip(np.asarray(result.tokens), starts, strict=True)
    ]
    if has_trace:
        rows = enumerate(zip(given.prompt, texts, inputs, strict=True))
        records = [trace_record(tokenizer, *texts_of_row, result, row, config) for row, texts_of_row in rows]
        Path(given.trace).write_text(render_page(records), encoding="utf-8")
    for prompt, text, num_forward, is_rejected, eos_prob in zip(
        given.prompt, texts, result.num_forward, result.is_rejected, result.eos_prob, strict=True
    ):
        if given.json:
            record = {"prompt": prompt, "text": text, "num_forward": int(num_forward), "is_rejected": bool(is_rejected)}
            print(json.dumps(record | {"eos_prob_first": float(eos_prob[0])}, ensure_ascii=False))
        else:
            print(f"> {prompt}\n{'[refused]' if is_rejected else text}")
            print(f"  ({int(num_forward)} forward passes, P([EOS]) at the first step {float(eos_prob[0]):.3f})\n")


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "folder of any kind that loads", required=True)
    flags.DEFINE_multi_string("prompt", None, "a request, or a text with <mask:N>", required=True)
    flags.DEFINE_string("adapter", None, "PEFT folder to attach")
    flags.DEFINE_bool("chat_template", False, "put a text with <mask:N> into a user turn")
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "of weights and activations")
    define_mesh_flag()
    flags.DEFINE_integer("seed", 0, "of temperature and random order")
    flags.DEFINE_bool("json", False, "print one JSON object a prompt")
    flags.DEFINE_string("trace", None, "HTML file to write, a replay of the decoding")
    define_sampler_flags()


if __name__ == "__main__":
    define_flags()
    app.run(main)
