"""How alike two texts are, by their vectors."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.tasks.asking import Pooling, Similarity
from plait.tasks.schema import NumberTask, TemplateText, kind


@kind("sentence_similarity")
class SentenceSimilarity(NumberTask):
    """The cosine of the vectors that a model without a head makes of two texts, compared with a number."""

    metrics: ClassVar = ("pearson", "spearman")
    kind: Literal["sentence_similarity"]
    second: Annotated[TemplateText, Field(description="Jinja2 template of the second text.")]
    metric: str = "spearman"
    pooling: Annotated[Pooling, Field(description="A text's vector: the mean of its tokens', or its first token's.")] = "mean"

    @property
    def ask(self) -> Similarity:
        """How answers are asked of a model."""
        return Similarity(max_tokens=self.max_tokens, pooling=self.pooling)
