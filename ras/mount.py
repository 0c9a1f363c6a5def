"""An enabled transformer: what is put on it, whose calls it gets, and the one under way."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from .branch import Branch, Call
from .callers import Turn, calling_pipeline
from .entry import among, joint_rows, leave, take, take_arguments, take_outputs
from .family import Family, matches
from .layout import Layout, Rows
from .others import change_of_rows
from .parallel import Stilled, obstacle, ranks_of
from .plan import Reuse
from .site import RASAttnProcessor, Walk
from .slots import (
    Answer,
    ForwardSlot,
    HookSlot,
    ProcessorSlot,
    forget_fused_originals,
    heads_of_keys,
    take_off_hooks,
)

if TYPE_CHECKING:
    from .session import Session

MOUNT = "_ras_mount"  # on a transformer, while enabled
COPY = "__deepcopy__"
RESET = "_reset_stateful_cache"  # what pipelines call on their components when they return


class Mount:
    """What is put on one transformer, for the sessions of the pipelines that share it.

    Attributes:
        transformer, family: The transformer and its record.
        sessions: Those that are told of its calls.
        call: The call under way as RAS has it go, or None where RAS stands aside.
    """

    def __init__(self, transformer: Any, family: Family) -> None:
        self.transformer, self.family = transformer, family
        self.sessions: list[Session] = []
        self.call: Call | None = None
        self._session: Session | None = None  # that of the call under way
        self._inputs: dict[str, Any] = {}  # all tokens' of a call that only some of them enter
        self._stilled: Stilled | None = None  # while its rows are split by us
        self._turn = Turn()
        self._parameters = list(inspect.signature(transformer.forward).parameters)
        self._layers = [
            ProcessorSlot(attn, rows, self._processor, lambda: self._walk)
            for attn, rows in family.attention_layers(transformer)
        ]
        self._hooks = self._entries() if family.regions else []
        self._handles: list[Any] = []
        self._forward: ForwardSlot | None = None

    def _entries(self) -> list[HookSlot]:
        """The hooks where tokens enter and leave."""
        transformer = self.transformer
        found = [HookSlot(transformer, self.family.leave, self._leave)]
        for path, module in transformer.named_modules():
            for pattern, spots in self.family.enter.items():
                if not path or not matches(path, pattern):
                    continue
                names = {spot: rows for spot, rows in spots.items() if isinstance(spot, str)}
                outputs = {spot: rows for spot, rows in spots.items() if not isinstance(spot, str)}
                if names:
                    positions = list(inspect.signature(module.forward).parameters)
                    hook = functools.partial(self._enter_arguments, names, positions)
                    found.append(HookSlot(transformer, path, hook, before=True))
                if outputs:
                    hook = functools.partial(self._enter_outputs, outputs)
                    found.append(HookSlot(transformer, path, hook))
        return found

    @staticmethod
    def of(transformer: nn.Module) -> Mount | None:
        """That of an enabled transformer."""
        found = vars(transformer).get(MOUNT)
        # A copy refers to it, too.
        return found if found is not None and found.transformer is transformer else None

    # --- on and off ---------------------------------------------------------------------------

    def add(self, session: Session) -> None:
        """Tell a session of the calls from now on."""
        with self._turn.held():
            if not self.sessions:
                self._attach()
            self.sessions.append(session)

    def remove(self, session: Session) -> None:
        """Tell it no more; with the last one, take off whatever is still ours."""
        with self._turn.held():
            self.sessions.remove(session)
            if not self.sessions:
                self._detach()

    def _attach(self) -> None:
        transformer = self.transformer
        ours = {MOUNT: self, RESET: self._end_of_call, COPY: self._plain_copy}
        for name, value in ours.items():
            setattr(transformer, name, value)
        self._handles = [
            transformer.register_forward_pre_hook(self._before_call, with_kwargs=True),
            transformer.register_forward_hook(self._after_call, with_kwargs=True, always_call=True),
        ]
        self._forward = ForwardSlot(transformer, _answer, self._interrupted)
        self.put_in_place()

    def _detach(self) -> None:
        self.call = None
        self._split_again()
        for part in (*self._handles, *self._hooks, *self._layers, self._forward):
            part.remove()
        self._forward = None
        forget_fused_originals(self.transformer)
        for name in (MOUNT, RESET, COPY):
            delattr(self.transformer, name)

    def _plain_copy(self, memo: dict[int, Any]) -> nn.Module:
        """A deep copy of the transformer as it would be without RAS."""
        assert self._forward is not None
        with self._turn.held(), self._forward.lifted():
            delattr(self.transformer, COPY)
            try:
                copied = copy.deepcopy(self.transformer, memo)
            finally:
                setattr(self.transformer, COPY, self._plain_copy)
        for name in (MOUNT, RESET):
            vars(copied).pop(name, None)
        for module in copied.modules():
            take_off_hooks(module, self)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Mount:
        """Itself: the hooks of a copy lead here, and do nothing."""
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        name = type(self.transformer).__name__
        raise pickle.PicklingError(
            f"this {name} is enabled, and what RAS keeps cannot be pickled; call ras.disable "
            "first, or pickle a copy.deepcopy, which is not enabled"
        )

    @property
    def key(self) -> tuple[int, int]:
        """What tells its calls from those of others, and of when it was spread otherwise."""
        return id(self), id(getattr(self.transformer, "_parallel_config", None))

    def obstacle_of_ranks(self, *, by_picture: bool = False) -> str | None:
        """Why there are no partial steps, if not, as the model is spread over processes.

        `by_picture` tells of a plan that is made by what a call is given.
        """
        layers = self.family.attention_layers(self.transformer)
        heads = (heads_of_keys(attn)[0] for attn, _ in layers)
        return obstacle(self.transformer, self.family, heads, by_picture=by_picture)

    def agreed(self, rows: Tensor | None) -> Tensor | None:
        """The rows to compute, on all ranks the same."""
        ranks = None if rows is None else ranks_of(self.transformer)
        return rows if rows is None or ranks is None else ranks.agree(rows)

    def obstacle(self) -> str | None:
        """The name of an attention processor that RAS cannot stand in for."""
        return next(filter(None, (layer.obstacle() for layer in self._layers)), None)

    def change_of_rows(self) -> str | None:
        """What may not take a part of the tokens, if there is anything."""
        layers = (attn for attn, _ in self.family.attention_layers(self.transformer))
        return change_of_rows(self.transformer, layers)

    def put_in_place(self) -> bool:
        """Have every hook and processor be ours where they can be, and say if any was not."""
        if self.obstacle() is not None:
            return False
        slots: list[HookSlot | ProcessorSlot] = [*self._hooks, *self._layers]
        return any([slot.put_in_place() for slot in slots])

    # --- a call of the transformer ------------------------------------------------------------

    @property
    def _walk(self) -> Walk | None:
        return None if self.call is None else self.call.walk

    def _processor(self) -> type[RASAttnProcessor] | None:
        """What takes the place of the layers' processors; None is the seam, which knows ranks."""
        return self.family.processor if ranks_of(self.transformer) is None else None

    def make_room(
        self,
        branch: Branch,
        batch: int,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        reuse: Reuse,
        caches: bool = True,
        carries: bool = False,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Make room for a branch's noise, and for its keys and values if it is to keep them.

        Args:
            branch: See above.
            batch: B.
            layout: The tokens of a sample.
            dtype, device: Of what is kept.
            reuse: Of the run.
            caches: Whether to keep keys and values, in the place of those there are.
            carries: Whether to keep how these change.
            cache_dtype: Of keys, values and their changes, `dtype` if None.
        """
        channels = self.transformer.get_submodule(self.family.leave).out_features
        shape = batch, layout.tokens, channels
        branch.tokens.allocate(shape, dtype, device, reuse=reuse)
        if not caches:
            return
        for cache in branch.caches:
            cache.reset()
        ranks = ranks_of(self.transformer)
        size = 1 if ranks is None else ranks.size
        branch.caches = branch.caches or [
            layer.new_cache(
                batch,
                layout,
                dtype,
                device,
                carries=carries,
                ranks=size,
                cache_dtype=cache_dtype,
            )
            for layer in self._layers
        ]

    def walk(
        self,
        branch: Branch,
        layout: Layout,
        gain: Tensor | None = None,
        *,
        reference_gain: Tensor | None = None,
        shared: bool = True,
        whole: bool = False,
        reuse_text: bool = False,
    ) -> Walk:
        """How the tokens of a branch's call go.

        Args:
            branch, layout: Of the call.
            gain: See `Walk.gain`.
            reference_gain: `(B, R)` float32, that of keys and values of references.
            shared: Whether rows are the same in all samples.
            whole, reuse_text: See `Walk`.
        """
        family, rows = self.family, branch.rows
        kv_gain = gain
        if gain is not None and reference_gain is not None:
            kv_gain = torch.cat([gain, reference_gain], dim=1)
        image, references = rows, None if rows is None or whole else branch.references
        if rows is not None and references is not None:
            image = torch.cat([rows, references + layout.tokens], dim=1)
        image = None if whole else image
        walk = Walk(
            branch.tokens,
            layout,
            rows,
            references,
            gain,
            kv_gain,
            whole,
            reuse_text=reuse_text and bool(family.text),
            image_first=family.image_first,
            shared=shared or not family.has_tables or image is None,
            image=image,
            joint=None if image is None else joint_rows(image, layout, family.image_first),
        )
        ranks = ranks_of(self.transformer)
        return walk if ranks is None else among(ranks, walk)

    def sessions_of(self, pipe: Any) -> list[Session]:
        """Those that a pipeline was enabled with, else those of its scheduler."""
        own = [session for session in self.sessions if session.origin.pipeline is pipe]
        return own or [each for each in self.sessions if each.origin.scheduler is pipe.scheduler]

    def _pipeline(self) -> Any | None:
        return calling_pipeline(filter(None, (each.origin.pipeline for each in self.sessions)))

    def _caller(self) -> Session | None:
        """The session whose run the call under way belongs to, if any is enabled for it.

        Of calls by hand, outside of any pipeline, nobody says whose they are; where more than one
        session may expect them they are left alone.
        """
        pipe = self._pipeline()
        if pipe is not None:
            found = self.sessions_of(pipe)
            if not found:
                self.sessions[0].tell_of_others(pipe)
            return found[-1] if found else None
        found = [session for session in self.sessions if session.expects_calls()]
        if len(found) > 1:
            found = [session for session in found if not session.has_ended]
        if len(found) > 1:
            found[0].tell_of_doubt()
        return found[0] if len(found) == 1 else None

    @torch.compiler.disable
    def _before_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decide how the tokens of this call go, before any of them enters."""
        if module is not self.transformer:
            return None
        self._turn.take()
        if Mount.of(self.transformer) is not self:  # it was taken off while the call waited
            self._turn.give()
            return None
        try:
            return self._begin_call(args, kwargs)
        except BaseException:  # forward hooks do not hear of them all
            self._interrupted()
            raise

    def _begin_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.call, self._session, self._inputs = None, None, {}
        if self._forward is not None:
            self._forward.before_call()
        self._session = self._caller()
        if self._session is None:
            return None
        inputs = {**dict(zip(self._parameters, args)), **kwargs}
        self.call = call = self._session.begin_call(self, inputs)
        if call is None or call.walk is None or call.skip:
            return None
        for layer, cache in zip(self._layers, call.branch.caches):
            layer.use(cache)
        if not call.walk.takes:
            return None
        self._inputs = inputs
        if call.walk.share is not None:
            self._stilled = Stilled(self.transformer)
        named: dict[str, Any] = {}
        if call.walk.reuse_text and call.walk.active is not None:
            left = self.family.text.items()
            named = {name: _none_of(inputs[name], dim) for name, dim in left if name in inputs}
        given = {**inputs, **named}
        spots = self.family.enter.get("", {}).items()
        named |= {name: take(given[name], rows, call.walk) for name, rows in spots if name in given}
        return ((), {**inputs, **named}) if named else None

    def answer(self) -> Answer | None:
        """What makes the output of a call that computes nothing, or None for one that does."""
        if self._forward is not None:
            self._forward.reached = True
        if self.call is None or not self.call.skip:
            return None
        return self.call.predictor(), self.call.finish

    @torch.compiler.disable
    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module is not self.transformer or not self._turn.mine:
            return None
        try:
            return self._end_call(output)
        finally:
            self._turn.give()

    def _end_call(self, output: Any) -> Any:
        self._split_again()
        call, self.call = self.call, None
        session, self._session = self._session, None
        inputs, self._inputs = self._inputs, {}
        missed = call is not None and self._missed(call)
        for layer in self._layers if call is not None else ():
            layer.use(None)
        if output is None:  # it failed, maybe before it came to anything
            if session is not None:
                session.call_failed()
            return None
        if self._forward is None:  # the call has switched us off
            return None
        self._forward.after_call()
        if missed and session is not None:
            session.attention_missed(again=bool(inputs))
            # What came out is of some tokens alone; this one computes all.
            return self.transformer(**inputs) if inputs else None
        if call is not None:
            call.end(output)
        return None

    def _split_again(self) -> None:
        """Have diffusers' hooks split rows as before a call in which they stood still."""
        if self._stilled is not None:
            self._stilled.back()
            self._stilled = None

    def _interrupted(self) -> None:
        """Do what the end of the call would, which does not come."""
        self._after_call(self.transformer, (), {}, None)

    def _missed(self, call: Call) -> bool:
        """Whether attention whose keys and values are kept went another way than ours."""
        keeps = call.walk is not None and not call.skip and not call.walk.whole
        return keeps and not all(layer.reached for layer in self._layers)

    def _enter_arguments(
        self,
        spots: Mapping[str, Rows],
        positions: list[str],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Let the active tokens alone go into a submodule."""
        walk = self._walk
        if walk is None or not walk.takes:
            return None
        return take_arguments(spots, positions, args, kwargs, walk)

    def _enter_outputs(
        self,
        spots: Mapping[int | None, Rows],
        module: nn.Module,
        args: Any,
        output: Any,
    ) -> Any:
        """Let the active tokens alone go on from a submodule."""
        walk = self._walk
        if walk is None or not walk.takes:
            return output
        return take_outputs(spots, output, walk)

    def _leave(self, module: nn.Module, args: Any, noise: Tensor) -> Tensor:
        """Merge the fresh noise into the branch's cached one; never hand out the cache itself."""
        walk = self._walk
        return noise if walk is None else leave(noise, walk, joint=self.family.leaves is Rows.JOINT)

    def _end_of_call(self, *args: Any, **kwargs: Any) -> None:
        """Do what a pipeline wants when it returns, from an interrupted run too."""
        pipe = self._pipeline()
        here = [session for session in self.sessions if session.is_here()]
        for session in here if pipe is None else self.sessions_of(pipe):
            session.end_of_call()
        inherited = getattr(type(self.transformer), RESET, None)
        if inherited is not None:
            inherited(self.transformer, *args, **kwargs)


@torch.compiler.disable
def _answer(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer | None:
    mount = Mount.of(transformer)
    return None if mount is None else mount.answer()


def _none_of(value: Tensor | None, dim: int) -> Tensor | None:
    """No rows of a tensor, along `dim`."""
    return None if value is None else value.narrow(dim, 0, 0)
