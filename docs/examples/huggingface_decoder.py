"""A Hugging Face decoder cut in two by its own pp_plan; prompt and next tokens, compared with the whole model.

Both stages run in this process, one after the other. Run it: python huggingface_decoder.py (needs transformers)
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pp_piecewise_backend as ppb
from pp_piecewise_backend.integrations.huggingface import DecoderStep, cut_decoder

MAX_TOKENS = 16


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    steps = [DecoderStep(stage, layout="sequence") for stage in cut_decoder(model, stages=2)]
    caches = [step.new_cache(max_cache_tokens=MAX_TOKENS) for step in steps]
    options: dict[str, Any] = {"compiler": "eager"}
    compiled = [torch.compile(step, backend="pp_piecewise", options=options) for step in steps]

    prompt = torch.tensor([5, 17, 3])
    tokens, generated = prompt, prompt
    with torch.inference_mode():
        for _ in range(4):
            positions = torch.arange(len(generated) - len(tokens), len(generated))
            rows = compiled[0](input_ids=tokens, position_ids=positions, past_key_values=caches[0])
            last = compiled[1](**rows, position_ids=positions, past_key_values=caches[1])
            tokens = last["tokens"][-1:]
            generated = torch.cat([generated, tokens])
        expected = model.generate(prompt[None], max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
    assert torch.equal(generated, expected), (generated, expected)
    print(f"{generated.tolist()}: as model.generate() says")
    print(ppb.explain().partition("  inputs (")[0])


if __name__ == "__main__":
    main()
