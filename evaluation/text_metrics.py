"""How close answers are to their references, word by word, in any script."""

import unicodedata

import numpy as np
import sacrebleu

from common.unicode_text import space_characters, split_words
from evaluation.metrics import rounded


def text_metrics(references: list[str], predictions: list[str]) -> dict:
    """Return corpus BLEU and chrF (0 to 100), mean ROUGE-L, share of exact matches, and ratio of word counts.

    In scripts without spaces between words, each character counts as a word.
    """
    references, predictions = (
        [unicodedata.normalize("NFC", text).strip() for text in texts] for texts in (references, predictions)
    )
    exact = [reference == prediction for reference, prediction in zip(references, predictions, strict=True)]
    references, predictions = (list(map(space_characters, texts)) for texts in (references, predictions))
    pairs = list(zip(references, predictions, strict=True))
    words = [sum(len(text.split()) for text in texts) for texts in (predictions, references)]
    return {
        "bleu": rounded(_bleu(references, predictions)),
        "chrf": rounded(sacrebleu.corpus_chrf(predictions, [references]).score),
        "rouge_l": rounded(np.mean([rouge_l(*pair) for pair in pairs])),
        "exact_match": rounded(np.mean(exact)),
        "length_ratio": rounded(words[0] / max(1, words[1])),
    }


def _bleu(references: list[str], predictions: list[str]) -> float:
    """Return BLEU; of n-grams that are too long for every reference, BLEU counts none, and equal texts would get 0.

    All-ASCII references keep the usual order of 4, so that results compare with those of other tools.
    """
    bleu = sacrebleu.BLEU()
    if not all(text.isascii() for text in references):
        longest = max(len(bleu.tokenizer(text).split()) for text in references)
        bleu = sacrebleu.BLEU(max_ngram_order=min(bleu.max_ngram_order, max(1, longest)))
    return bleu.corpus_score(predictions, [references]).score


def rouge_l(reference: str, prediction: str) -> float:
    """Return ROUGE-L, F1 of the longest common subsequence of words, which are those of any script."""
    expected, found = split_words(reference), split_words(prediction)
    lengths = [0] * (len(found) + 1)  # of the longest one up to each word found
    for word in expected:
        before = 0
        for n, other in enumerate(found, 1):
            before, lengths[n] = lengths[n], before + 1 if word == other else max(lengths[n], lengths[n - 1])
    return 2 * lengths[-1] / (len(expected) + len(found)) if lengths[-1] else 0.0
