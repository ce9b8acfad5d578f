# SPDX-License-Identifier: MIT
"""Networks of your own: ``--model path/to/file.py:function`` or ``path/to/file.py:function@layer``.

The function is called as ``function(channels, classes, size)``, size being (H, W), and gives a new
:class:`torch.nn.Module` that takes images [N, C, H, W] to logits [N, classes]. What is matched is
what its method ``embed(x)`` gives; or the output of the ``layer`` of that name in ``named_modules``
(its ``forward`` ends there); or, with neither, the input of the linear layer whose output the
logits are. Embeddings are flattened to [N, D].

Every network is drawn anew, whatever the function made of the weights: convolutions and linear
layers by torch's default initialisation, norms as the identity; any other module that has a
``reset_parameters()`` by that, children before parents, so that one of the whole network can draw
all in its own way. A parameter that neither draws is an error. Buffers are set back to what they
were. What is drawn from torch's generators, there or in ``forward`` (dropout), follows from the
seed as everything else does, though not to the same numbers on a CPU and on a GPU; it keeps an
iteration from being captured in a CUDA graph. Numbers from elsewhere (numpy, ``random``) do not.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._zoo import Network
from .errors import InputError

GRAMMAR = "path/to/file.py:function[@layer]"
_NAME = re.compile(r"(.+\.py):([^\W\d]\w*)(?:@(.+))?")

Key = tuple[int, int, int, int]  # seed, step, stream, number of the network

# Those that functions have given: the same one twice would be drawn and trained by two at once.
_GIVEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_LOADED: dict[tuple[Path, bytes], ModuleType] = {}


class _Name(NamedTuple):
    path: Path
    function: str
    layer: str | None


def is_own(name: str) -> bool:
    """Whether the name is that of a function in a file, well written or not."""
    return re.search(r"\.py(?=[:@]|$)", name) is not None


def _parse(name: str) -> _Name:
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise InputError(f"--model {name}: a model of your own is {GRAMMAR}")
    path, function, layer = parts.groups()
    return _Name(Path(path), function, layer)


def short_name(name: str) -> str:
    """A model's name as part of that of a folder: of a file's function without its folder."""
    if not is_own(name):
        return name
    path, function, layer = _parse(name)
    return re.sub(r"[^\w-]+", "-", "-".join(filter(None, (path.stem, function, layer))))


def model_file(name: str) -> str | None:
    """A digest of the file that a model of that name is in; None of those that dmfast has.

    Raises:
        InputError: it cannot be read.
    """
    if not is_own(name):
        return None
    path = _parse(name).path
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise _unreadable(name, path, error) from error


class OwnNetwork(Network):
    """A module of the user's, with what a :class:`Network` has.

    Attributes:
        name: by which it was asked for.
        network: the module.
        mixes_batch: whether the embedding of an image depends on the others of its batch.
    """

    name: str
    network: nn.Module

    def __init__(
        self, name: str, network: nn.Module, layer: str | None, images: Tensor, classes: int
    ) -> None:
        """``images`` [3, C, H, W] are tried on it, on the CPU.

        Raises:
            InputError: the network or its layer cannot be used.
        """
        super().__init__()
        self.name = name
        self.network = network.train()
        self._key: Key | None = None
        self._calls = 0
        self._draws = True  # until the contrary is known
        self._embedding_size = 0
        self.mixes_batch = False
        # Those of lazy modules are made by a pass, which may change others.
        before = {
            key: buffer.clone()
            for key, buffer in network.named_buffers()
            if not nn.parameter.is_lazy(buffer)
        }
        with _blamed(name, "forward"):
            self._tap = self._find_tap(layer, images[:2], classes)
        for key, buffer in network.named_buffers():
            if key in before:
                buffer.copy_(before[key])
        self._buffers_at_first = [f"at_first_{i}" for i, _ in enumerate(network.buffers())]
        for at_first, buffer in zip(self._buffers_at_first, network.buffers(), strict=True):
            self.register_buffer(at_first, buffer.clone(), persistent=False)

    @property
    def embedding_size(self) -> int:
        """See :class:`Network`."""
        return self._embedding_size

    def embed(self, x: Tensor) -> Tensor:
        """See :class:`Network`."""
        return self._seeded(self._embed, x)

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`Network`."""
        return self._seeded(self.network, x)

    def begin(self, key: Key) -> None:
        """Sets the buffers back, and has what is drawn from now on follow from ``key``."""
        self._key, self._calls = key, 0
        self._set_back()

    @property
    def draws(self) -> bool:
        """Whether its passes draw random numbers."""
        return self._draws

    def try_out(self, images: Tensor) -> None:
        """Learns how it behaves once its weights are drawn.

        Raises:
            InputError: it gives no embedding, or one that does not depend on the images, or
                numbers that nothing can be learned from.
        """
        with _blamed(self.name, "embed"), torch.enable_grad():
            x = images[:2].clone().requires_grad_()
            embedding, embed_draws = self._watched(self._embed, x)
            mates = torch.stack([images[0], images[2]])
            (first, _), _ = self._watched(self._embed, mates)
            logits, forward_draws = self._watched(self.network, x)
        if len(embedding) != 2 or not embedding.is_floating_point():
            raise self._error(
                f"its embedding of {_described(x)} is {_described(embedding)}: it must be [2, D]"
            )
        if not embedding.requires_grad:
            raise self._error(
                "its embedding has no gradient to the images: leave out detach and no_grad"
            )
        if not embedding.isfinite().all():
            raise self.not_finite(f"its embedding of {_described(x)} is")
        if not are_sound(logits):
            raise self.not_finite(f"its logits of {_described(x)} are")
        self._draws = embed_draws or forward_draws
        self._embedding_size = embedding.shape[1]
        self.mixes_batch = not torch.allclose(
            embedding[0], first, rtol=1e-4, atol=1e-6, equal_nan=True
        )

    def not_finite(self, what: str) -> InputError:
        """What to raise where numbers of its passes, as ``its logits are``, are not finite."""
        return self._error(
            f"{what} not finite: look for a division by 0, a logarithm or root of numbers below 0, "
            "or numbers that grow from layer to layer, which a norm between them prevents"
        )

    @torch.no_grad()
    def _set_back(self) -> None:
        for at_first, buffer in zip(self._buffers_at_first, self.network.buffers(), strict=True):
            buffer.copy_(getattr(self, at_first))

    def _watched(self, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, bool]:
        """What a function makes of x, each time from the same state, and whether it draws."""
        self._set_back()
        with seeded(x.device):
            before = torch.get_rng_state()
            return function(x), not torch.equal(before, torch.get_rng_state())

    def _embed(self, x: Tensor) -> Tensor:
        if self._tap is None:
            embedding = self.network.embed(x)  # type: ignore[operator]
        else:
            layer, of_input = self._tap
            taken: list[Any] = []

            def take(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                taken.append(inputs[0] if of_input else output)
                raise _Reached

            hook = layer.register_forward_hook(take)
            try:
                self.network(x)
            except _Reached:
                pass
            finally:
                hook.remove()
            (embedding,) = taken
        if not isinstance(embedding, Tensor):
            raise self._error(f"its embedding is {_described(embedding)}: it must be a tensor")
        return embedding.flatten(1)

    def _seeded(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # Contiguous: the user's code may view images as it pleases.
        x = x.contiguous()
        if not self._draws:
            return function(x)
        self._calls += 1
        with seeded(x.device, *(self._key or ()), self._calls):
            return function(x)

    def _find_tap(
        self, layer: str | None, images: Tensor, classes: int
    ) -> tuple[nn.Module, bool] | None:
        """The layer whose input or output is the embedding, and whether its input is."""
        calls: list[tuple[nn.Module, tuple[Any, ...], Any]] = []
        hooks = [
            module.register_forward_hook(lambda *call: calls.append(call))
            for module in self.network.modules()
        ]
        try:
            with torch.no_grad():
                logits = self._seeded(self.network, images)
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(logits, Tensor) or logits.shape != (len(images), classes):
            raise self._error(
                f"it makes {_described(logits)} of {_described(images)}: it must be the logits, a "
                f"tensor of shape {[len(images), classes]}"
            )
        if layer is not None:
            modules = dict(self.network.named_modules())
            if not layer or layer not in modules:
                raise self._error(f"it has no layer {layer!r}: {self._layers()}")
            called = sum(module is modules[layer] for module, _, _ in calls)
            if called != 1:
                raise self._error(
                    f"its layer {layer!r} is called {called} times in a pass, and must be once: "
                    "name another"
                )
            return modules[layer], False
        if callable(getattr(self.network, "embed", None)):
            return None
        for module, inputs, output in calls:
            if (
                isinstance(module, nn.Linear)
                and output is logits
                and inputs
                and sum(other is module for other, _, _ in calls) == 1
            ):
                return module, True
        raise self._error(
            "its logits are not the output of a linear layer, and it has no method embed(x): give "
            f"it one that returns [N, D], or name the layer to match by {GRAMMAR}; "
            f"{self._layers()}"
        )

    def _layers(self) -> str:
        return "its layers are " + ", ".join(
            name for name, _ in self.network.named_modules() if name
        )

    def _error(self, words: str) -> InputError:
        return InputError(f"--model {self.name}: {words}")


def are_sound(logits: Tensor) -> Tensor:
    """Whether each row has a softmax: one of them may be minus infinity, as of a masked class."""
    return logits.logsumexp(1).isfinite().all()


class _Reached(BaseException):
    """The pass has come to the layer whose output is the embedding: the rest is not needed."""


def own_network(
    name: str,
    channels: int,
    classes: int,
    size: tuple[int, int],
    seed: int | None,
    draw_: Callable[[nn.Module, int], None],
) -> OwnNetwork:
    """The network that the function of that name makes, drawn by ``draw_(network, seed)``.

    Args:
        seed: None: one from the global generator.

    Raises:
        InputError: the file, the function or the network cannot be used.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    path, function_name, layer = _parse(name)
    cpu = torch.device("cpu")
    with _import_path(path.parent), seeded(cpu, seed), torch.device(cpu):
        function = getattr(_load(name, path), function_name, None)
        if not callable(function):
            raise InputError(f"--model {name}: {path} has no function {function_name!r}")
        with _blamed(name, f"{function_name}({channels}, {classes}, {size})"):
            module = function(channels, classes, size)
        if not isinstance(module, nn.Module):
            raise InputError(
                f"--model {name}: {function_name} gives {_described(module)}: it must be a "
                "torch.nn.Module"
            )
        if module in _GIVEN:
            raise InputError(
                f"--model {name}: {function_name} gives the same network twice: it must make one"
            )
        _GIVEN.add(module)
        images = torch.randn(3, channels, *size)
        network = OwnNetwork(name, module.to("cpu").float(), layer, images, classes)
        _check_drawn(network, partial(draw_, network, seed))
        network.try_out(images)
        draw_(network, seed)
    return network


@torch.no_grad()
def _check_drawn(network: OwnNetwork, draw: Callable[[], None]) -> None:
    """Draws the network.

    Raises:
        InputError: a parameter would be left as it was.
    """
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.fill_(torch.nan)
    with _blamed(network.name, "reset_parameters"):
        draw()
    for parameter_name, parameter in network.network.named_parameters():
        if parameter.isnan().any():
            layer, _, own_name = parameter_name.rpartition(".")
            raise undrawn(layer, network.network.get_submodule(layer), own_name, network.name)


def undrawn(layer: str, module: nn.Module, parameter: str, model: str | None = None) -> InputError:
    """What to raise where a parameter of a layer cannot be drawn."""
    where = f"its layer {layer!r}" if layer else "the network"
    return InputError(
        (f"--model {model}: " if model else "")
        + f"{where} ({type(module).__name__}) has a parameter {parameter!r} that nothing draws "
        "anew: give the class a method reset_parameters() that does, or make it of layers of "
        "torch.nn"
    )


def number_of(step: int | Tensor) -> int:
    """The number that a step holds.

    Raises:
        RuntimeError: it is not to be known, as a CUDA graph is captured.
    """
    if isinstance(step, Tensor) and step.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the network draws random numbers by itself")
    return int(step)


@contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Within it torch's generators of the CPU and of the device follow from ``key``."""
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the network draws random numbers by itself")
    number = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    with torch.random.fork_rng([device] if on_gpu else []):
        # Not torch.manual_seed, which seeds the generators of all GPUs.
        torch.default_generator.manual_seed(number)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def _load(name: str, path: Path) -> ModuleType:
    """The file as a module, which it is once for as long as it does not change."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise _unreadable(name, path, error) from error
    path = path.resolve()
    key = path, source
    if key not in _LOADED:
        # Not by an importer, which would write its bytecode beside the file; but in sys.modules, as
        # dataclasses and pickles need it, under a name of its own.
        module = ModuleType(f"_dmfast_own_{len(_LOADED)}_{path.stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module
        try:
            with _blamed(name, path.name):
                exec(compile(source, path, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[module.__name__]
            raise
        _LOADED[key] = module
    return _LOADED[key]


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    """Within it the files beside the user's can be imported, as where Python runs that."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


@contextmanager
def _blamed(name: str, what: str) -> Iterator[None]:
    """Turns what goes wrong in the user's code into one line that says where."""
    path = _parse(name).path
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"--model {name}: {what} raised {type(error).__name__}"
            + (f": {said}" if said else "")
            + _place(error, path.resolve())
        ) from error


def _place(error: BaseException, path: Path) -> str:
    """The last line of the file that the error came through."""
    if isinstance(error, SyntaxError):
        return ""  # it says so itself
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if Path(frame.filename) == path:
            return f" (line {frame.lineno} of {path.name}: {frame.line})"
    return ""


def _unreadable(name: str, path: Path, error: OSError) -> InputError:
    return InputError(
        f"--model {name}: {path} cannot be read: {error.strerror or error}; name a file as "
        f"{GRAMMAR}"
    )


def _described(thing: object) -> str:
    """A value in words."""
    if isinstance(thing, Tensor):
        return f"a tensor of shape {list(thing.shape)}"
    if thing is None:
        return "None"
    return f"a {type(thing).__name__}"
