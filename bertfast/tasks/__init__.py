"""What a trained model is for: one callable per task."""

from bertfast.tasks.answer import Answer, Answered, Found
from bertfast.tasks.classify import Classify, Label
from bertfast.tasks.embed import Embed
from bertfast.tasks.fill_mask import Filled, FillMask
from bertfast.tasks.next_sentence import NextSentence
from bertfast.tasks.tag import Span, Tag, Tagged, Word

__all__ = [
    "Answer",
    "Answered",
    "Classify",
    "Embed",
    "FillMask",
    "Filled",
    "Found",
    "Label",
    "NextSentence",
    "Span",
    "Tag",
    "Tagged",
    "Word",
]
