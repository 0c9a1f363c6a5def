"""What the controller has to know of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from ..attention import RASAttnProcessor


class Adapter(ABC):
    """Where tokens enter, attend and leave. `inputs` are the arguments of `forward`, by name."""

    model: type
    blocks: str  # the list of those that repeat
    enter: str  # the submodule whose output is the embedded tokens
    leave: str  # the submodule whose output is the tokens' noise
    processor: type[RASAttnProcessor]

    @abstractmethod
    def attention_layers(self, transformer: Any) -> Iterator[Any]:
        """The layers whose keys and values are cached."""

    @abstractmethod
    def gather_entered(self, output: Any, rows: Tensor) -> Any:
        """The active rows of what `enter` returned."""

    def gather_inputs(
        self, inputs: Mapping[str, Any], rows: Tensor, *, reuse_text: bool
    ) -> dict[str, Any]:
        """Those inputs that have a row per token, with the rows alone that walk."""
        return {}

    def image_of(self, tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
        """The noise image, `(B, C, height, width)`, that the transformer makes of its tokens."""
        (height, width), p = grid, patch_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)

    def branch(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """The layers that this call skips."""
        return ()

    def text_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Tokens that walk through the blocks beside the image's."""
        return 0

    def usual_text_tokens(self, pipe: Any) -> int:
        """What `text_tokens` is in a call of the pipeline with its default arguments."""
        return 0

    def positions(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """What cached keys were rotated by, on the CPU: with other ones, they are of no use."""
        return None
