"""The benchmarks' own scores: caption metrics, VQA accuracy, NLVR2's consistency."""

from optima.metrics.captions import CaptionScores, bleu, caption_scores, cider_d, rouge_l
from optima.metrics.nlvr2 import consistency
from optima.metrics.ptb import tokenize
from optima.metrics.vqa import vqa_accuracy

__all__ = ["CaptionScores", "bleu", "caption_scores", "cider_d", "consistency", "rouge_l", "tokenize", "vqa_accuracy"]
