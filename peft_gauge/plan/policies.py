"""What to do where a tuner's code needs values and a plan has only shapes.

Most PEFT types attach to a model on `meta` and step with fake tensors as they are. Some read values: a decomposition of
the base weights, a random mask, a coin that drops a module. For each there is a policy here, taken only when its code
is reached, and each policy taken leaves one sentence in `warnings`. A type that is not named here is simply tried; what
then still needs values ends in `CannotPlan`, which names the operation.

Order of use: `with attaching(method): methods.attach(...)` on `meta`, then `fakes.to_fake`, then one traced step
`with mode, cuda_kernels(), unpacked_sequences(), stepping(model), tracker:`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from peft_gauge._internals import moved, released
from peft_gauge._internals import peft as peft_internals
from peft_gauge._internals.torch import NEEDS_VALUES, modules_of, shape_rules, sparse_coo, sparse_parts
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.plan import fakes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn

    from peft_gauge.training.methods import Method

_GROUPED_ALIGNMENT = 16  # bytes to which grouped products pad their rows (ATen/native/GroupedMMUtils.h)


class CannotPlan(GaugeError):
    """An operation of the method needs values that no policy supplies; the message names it."""


# Attaching


@contextmanager
def attaching(method: Method | Mapping[str, Any]) -> Iterator[list[str]]:
    """Around `methods.attach` on `meta`: initialisations that read weights make only the shapes of their results.

    Args:
        method: the method, or the content of an `adapter_config.json`.

    Yields:
        The warnings, one sentence for each policy taken; complete when the block ends.

    Raises:
        CannotPlan: the initialisation needs values in a way that is not known here.
    """
    config: Mapping[str, Any] = method if hasattr(method, "keys") else method.peft_config  # type: ignore[assignment]
    said: list[str] = []
    policy = _ATTACHING.get(str(config.get("peft_type", "")))
    with ExitStack() as stack:
        if policy is not None:
            policy(_Patches(stack, said), config)
        heard = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        with _translated():
            yield said
    said += _about_the_config(str(warning.message) for warning in heard)


# How PEFT's own warnings about a config begin: what in it has no effect.
_WITHOUT_EFFECT = (
    "Unexpected keyword arguments", "target_modules=", "target_parameters=", "The following rank_pattern",
    "The following alpha_pattern", "You have passed exclude_modules",
)  # fmt: skip


def _about_the_config(messages: Iterable[str]) -> Iterator[str]:
    for message in dict.fromkeys(messages):
        if message.startswith(_WITHOUT_EFFECT):
            yield f"PEFT says: {one_line(message.partition('. ')[0], 240)}."


class _Patches:
    """Replacements of library attributes that end with `stack`; each says in `warnings` when it is first used."""

    def __init__(self, stack: ExitStack, warnings: list[str]) -> None:
        self.stack = stack
        self.warnings = warnings

    def warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def replace(
        self, owner: str, make: Callable[[Any], Any], *, since: str = "0.18.0", wanted: bool = True, warning: str = ""
    ) -> None:
        """`owner` is 'module:Class.attribute'; `make` gets the original and returns what stands in for it.

        Where the library has no such attribute, nothing is replaced. Releases before ``since`` lack newer tuners and
        options; in any other the piece was moved, and a warning says so if the plan reaches it (``wanted``).
        """
        module, _, path = owner.partition(":")
        *parents, name = path.split(".")
        try:
            target: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            target = None
        for parent in parents:
            target = getattr(target, parent, None)
        original = vars(target).get(name) if target is not None else None
        if original is None:
            if wanted and released("peft", since):
                self.warn(moved("peft", owner.replace(":", ".")))
            return
        is_static = isinstance(original, staticmethod)
        stand_in = make(original.__func__ if is_static else original)

        def used(*args: Any, **kwargs: Any) -> Any:
            if warning:
                self.warn(warning)
            return stand_in(*args, **kwargs)

        setattr(target, name, staticmethod(used) if is_static else used)
        self.stack.callback(setattr, target, name, original)


def _asks_for(config: Mapping[str, Any], variant: str) -> bool:
    """Whether a setting of ``config`` that is on names ``variant``: ``init_lora_weights="pissa"``, for instance."""
    return any(value and variant in f"{name}={value}".lower() for name, value in config.items())


def _attach_lora(patches: _Patches, config: Mapping[str, Any]) -> None:
    def default_values(layer: Any, adapter_name: str, *_: Any, **__: Any) -> None:
        layer.reset_lora_parameters(adapter_name, True)

    inits = {"PiSSA": "0.18.0", "OLoRA": "0.18.0", "CorDA": "0.18.0", "MiCA": "0.20.0", "LoftQ": "0.18.0"}
    for title, since in inits.items():
        patches.replace(
            f"peft.tuners.lora.layer:LoraLayer.{title.lower()}_init",
            lambda _: default_values,
            since=since,
            wanted=_asks_for(config, title.lower()),
            warning=f"{title} initialisation from the base weights skipped: shapes only.",
        )

    def not_truncated(original: Callable[..., None]) -> Callable[..., None]:
        def init(module: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            original(module, adapter_name, *args, **kwargs)
            peft_internals.kasa_deferred(module).discard(adapter_name)

        return init

    patches.replace(
        "peft.tuners.lora.variants:KasaLinearVariant.init",
        not_truncated,
        since="0.21.0",
        wanted=_asks_for(config, "kasa"),
        warning="KaSA's truncation of the base weights (an SVD a layer, once) skipped: shapes only.",
    )

    montecloras: dict[str, Any] = {"since": "0.20.0", "wanted": _asks_for(config, "monteclora")}
    patches.replace("peft.tuners.lora.variants:MontecloraLinearVariant.init", _with_sampler, **montecloras)
    patches.replace(
        "peft.tuners.lora.monteclora:BufferedMontecloraSampler.__init__",
        lambda _: _unfilled_sampler,
        **montecloras,
        warning="MonteCLoRA's samples not drawn; a refill of their buffers, which holds two at once, is not planned.",
    )


def _with_sampler(original: Callable[..., None]) -> Callable[..., None]:
    """PEFT would make the sampler in the first forward, after the optimizer was given its parameters."""

    def init(module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        original(module, adapter_name, config, **kwargs)
        if adapter_name not in module.lora_monteclora_sampler:
            with torch.device("meta"):
                sampler = peft_internals.montecloras_sampler(module, adapter_name, config.monteclora_config)
            module.lora_monteclora_sampler[adapter_name] = sampler

    return init


def _unfilled_sampler(sampler: Any, model: Any, buffer_size: int = 150, device: Any = None) -> None:
    rank, dtype = model.out_features, model.dtype
    sampler.model, sampler.device, sampler.buffer_size, sampler.index = model, device, buffer_size, 0
    weights = torch.empty(buffer_size, model.num_samples, model.in_features, rank, dtype=dtype, device=device)
    priors = torch.empty(buffer_size, model.num_samples, dtype=dtype, device=device)
    sampler.buffer = [
        {"z_mvn": mvn, "z_wishart": torch.empty(rank, rank, dtype=dtype, device=device), "z_dirichlet": dirichlet}
        for mvn, dirichlet in zip(weights, priors, strict=True)
    ]


def _attach_shira(patches: _Patches, config: Mapping[str, Any]) -> None:
    def without_mask(original: Callable[..., None]) -> Callable[..., None]:
        def update_layer(layer: Any, adapter_name: str, mask: Any, *args: Any, **kwargs: Any) -> None:
            original(layer, adapter_name, None, *args, **kwargs)
            count = layer.shira_weight[adapter_name].numel()
            layer.shira_indices[adapter_name] = torch.empty(2, count, dtype=torch.int, device="meta")

        return update_layer

    patches.replace("peft.tuners.shira.config:random_mask", lambda _: lambda *args, **kwargs: None)
    patches.replace(
        "peft.tuners.shira.layer:ShiraLayer.update_layer",
        without_mask,
        warning="SHiRA's sparse masks not drawn: their number of positions only.",
    )


def _attach_adamss(patches: _Patches, config: Mapping[str, Any]) -> None:
    def factors(tensor: torch.Tensor, r: int, device: Any, dtype: torch.dtype, **_: Any) -> tuple[Any, Any]:
        batch, channels, rows, columns = tensor.shape
        rank = min(r, rows, columns)
        right = torch.empty(batch, channels, rank, columns, dtype=dtype, device=device)
        return right, torch.empty(batch, channels, rows, rank, dtype=dtype, device=device)

    def even_clusters(rows: torch.Tensor, num_subspaces: int, iternum: int) -> tuple[torch.Tensor, int]:
        clusters = min(num_subspaces, rows.shape[0])
        return torch.arange(rows.shape[0]) % clusters, clusters

    def fixed_rank(original: Callable[..., None]) -> Callable[..., None]:
        def update_layer(layer: Any, adapter_name: str, r: int, config: Any, **kwargs: Any) -> None:
            if config.use_dynamic_rank:
                patches.warn("AdaMSS's dynamic ranks depend on the weights: the largest, subspace_rank, assumed.")
                config.use_dynamic_rank = False
            original(layer, adapter_name, r, config, **kwargs)

        return update_layer

    _without_sklearn(patches)
    layer = "peft.tuners.adamss.layer"
    patches.replace(f"{layer}:slice_pca", lambda _: factors, since="0.19.0")
    patches.replace(
        f"{layer}:clustering_Z",
        lambda _: even_clusters,
        since="0.19.0",
        warning="AdaMSS's k-means of the base weights replaced by clusters of equal size.",
    )
    patches.replace(f"{layer}:AdamssLayer.update_layer", fixed_rank, since="0.19.0")


def _without_sklearn(patches: _Patches) -> None:
    """AdaMSS's config asks whether scikit-learn can be imported; its k-means is not run here."""
    if "sklearn" not in sys.modules:
        sys.modules["sklearn"] = ModuleType("sklearn")
        patches.stack.callback(sys.modules.pop, "sklearn")


def _attach_frod(patches: _Patches, config: Mapping[str, Any]) -> None:
    def factors(layer: Any, V: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # PEFT asks for copies on the CPU, which `meta` cannot give; memory never written to is none.
        return torch.empty(W.shape, dtype=V.dtype), torch.empty(W.shape[1])

    patches.replace("peft.tuners.frod.layer:FrodLayer._calculate_frod_u_and_lambda", lambda _: factors, since="0.20.0")
    patches.replace(
        "peft.tuners.frod.model:FrodModel._init_frod_projections",
        lambda _: _frod_projections,
        since="0.20.0",
        warning="FRoD's joint decomposition of the base weights skipped: shapes only.",
    )


def _frod_projections(tuner: Any, config: Any, adapter_name: str) -> None:
    """`FrodModel._init_frod_projections` without values: V (in×in), COO indices and size for each category of layer."""
    from torch import nn

    category_of, buffers = peft_internals.frod_category(), peft_internals.buffer_dict()
    settings = peft_internals.settings_of(tuner, config)
    if not hasattr(tuner, "frod_V"):
        tuner.frod_V, tuner.frod_s_indices, tuner.frod_s_size = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
    for key, module in tuner.model.named_modules():
        category = category_of(key)
        if not isinstance(module, nn.Linear) or not peft_internals.is_target(tuner, settings, key):
            continue
        if adapter_name in modules_of(tuner.frod_V).get(category, ()):
            continue
        width = module.in_features
        most = width * width - width
        count = min(int(width * width * config.sparse_rate), most)
        if config.sparse_rate > 0 and most:
            count = max(1, count)
        made = {
            "frod_V": torch.empty(width, width, dtype=module.weight.dtype),
            "frod_s_indices": torch.empty(2, count, dtype=torch.long),
            "frod_s_size": torch.tensor([width, width]),
        }
        for name, value in made.items():
            holder = getattr(tuner, name)
            holder[category] = buffers({}, persistent=config.save_projection)
            holder[category][adapter_name] = value


def _attach_spectral(patches: _Patches, config: Mapping[str, Any]) -> None:
    patches.warn("The random positions of the trained frequencies not drawn: their number only.")
    patches.stack.enter_context(_NoPermutations())


class _NoPermutations(TorchFunctionMode):
    """A permutation of all positions of a weight takes a second a layer of a 7B model; only its length is used."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randperm:
            return torch.empty(args[0], dtype=torch.long)
        return func(*args, **(kwargs or {}))


def _attach_xlora(patches: _Patches, config: Mapping[str, Any]) -> None:
    def uncached(original: Callable[..., None]) -> Callable[..., None]:
        def init(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            model.config.use_cache = False  # X-LoRA refuses a base that has it on; a training step has it off anyway
            original(tuner, model, *args, **kwargs)

        return init

    patches.replace("peft.tuners.xlora.model:XLoraModel.__init__", uncached)


def _attach_adalora(patches: _Patches, config: Mapping[str, Any]) -> None:
    patches.warn(
        "AdaLoRA's rank counters count as trainable: PEFT makes them so for every base but one in float32 on the CPU."
    )


def _attach_prompt(patches: _Patches, config: Mapping[str, Any]) -> None:
    init = config.get("prompt_tuning_init")
    if init not in (None, "RANDOM", "SAMPLE_VOCAB"):  # `methods.attach` makes random ones of the same shape on meta
        patches.warn(f"Virtual tokens not initialised from {init}: shapes only.")


_ATTACHING: dict[str, Callable[[_Patches, Mapping[str, Any]], None]] = {
    "LORA": _attach_lora,
    "SHIRA": _attach_shira,
    "ADAMSS": _attach_adamss,
    "FROD": _attach_frod,
    "FOURIERFT": _attach_spectral,
    "WAVEFT": _attach_spectral,
    "XLORA": _attach_xlora,
    "ADALORA": _attach_adalora,
    "PROMPT_TUNING": _attach_prompt,
    "MULTITASK_PROMPT_TUNING": _attach_prompt,
}


# Stepping

# How a question about values is answered where "no" would leave out the costly path: by PEFT type.
_YES = {
    "LOHA": "no layer dropped by module_dropout",
    "LOKR": "no layer dropped by module_dropout",
    "CPT": "the projection of learned tokens taken, as from the second step on",
}


@contextmanager
def stepping(model: nn.Module) -> Iterator[list[str]]:
    """Around a traced step, inside the fake mode: answers questions about values, and says which.

    A truth value is answered with no (NaN found? norm zero? token out of range?) but for the types where yes is the
    costly way; a number with 0; positions of what is true in a mask with all positions, an upper bound; `unique`
    with one value. A sparse tensor is taken as having no duplicate positions.

    Yields:
        The warnings, one sentence for each kind of answer given and each policy taken; complete when the block ends.

    Raises:
        CannotPlan: an operation needs values in another way.
    """
    configs = list(getattr(model, "peft_config", {}).values())
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs}
    with ExitStack() as stack:
        patches = _Patches(stack, [])
        for sentence in fakes.unrouted(model):
            patches.warn(sentence)
        _whole_sequence_alora(patches, wanted=any(getattr(c, "alora_invocation_tokens", None) for c in configs))
        _fixed_sparse_size(patches, wanted="FROD" in kinds)
        if any(isinstance(module, torch.nn.RNNBase) for module in model.modules()):
            patches.warn("A recurrent layer is traced step by step; the reserve of cuDNN's fused one is not modelled.")
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yes = next((_YES[kind] for kind in sorted(kinds) if kind in _YES), "")
        answers = _Answers(patches, yes, _experts(model))
        stack.enter_context(_fake_operators(answers.operators()))
        with _translated():
            yield patches.warnings


def extra_inputs(model: nn.Module, batch: int, seq: int) -> dict[str, torch.Tensor]:
    """What `model`'s PEFT type wants in a batch beside `input_ids` and `labels`; call it inside the fake mode.

    Poly and multitask prompt tuning: `task_ids` (batch,); CPT: `input_type_mask` (batch, seq); 64-bit integers.
    """
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in getattr(model, "peft_config", {}).values()}
    extra: dict[str, torch.Tensor] = {}
    if kinds & {"POLY", "MULTITASK_PROMPT_TUNING"}:
        extra["task_ids"] = torch.zeros(batch, dtype=torch.long)
    if "CPT" in kinds:
        extra["input_type_mask"] = torch.full((batch, seq), 4, dtype=torch.long)
    return extra


def update_importance(model: nn.Module) -> None:
    """The state that AdaLoRA and AdaMSS keep between steps, made as their `update_and_allocate` makes it.

    Call it where a training loop calls that: between the optimizer's step and `zero_grad`. Ranks are not reallocated,
    which would change no shape. What is kept is among `fakes.plain_tensors(model)`. Does nothing for other types.
    """
    tuner = getattr(model, "base_model", None)
    allocator = getattr(tuner, "rankallocator", None)
    if allocator is not None:
        allocator.update_ipt(tuner.model)  # type: ignore[union-attr]
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "exp_avg_ipt_A")]
    for layer in layers:
        for adapter in layer.exp_avg_ipt_A:
            asa = configs[adapter]
            layer.update_importance(adapter, asa.asa_importance_beta, asa.asa_uncertainty_beta)


def _experts(model: nn.Module) -> int:
    """Experts a layer of a mixture-of-experts base, 0 for a dense one."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int)), 0)


def _whole_sequence_alora(patches: _Patches, *, wanted: bool) -> None:
    def every_token(peft_config: Any, active_adapter: str, input_ids: torch.Tensor, *_: Any, **__: Any) -> list[int]:
        return [input_ids.shape[1]] * input_ids.shape[0]

    patches.replace(
        "peft.tuners.lora.variants:calculate_alora_offsets",
        lambda _: every_token,
        wanted=wanted,
        warning="aLoRA's invocation taken to stand at the first token: an upper bound.",
    )


def _fixed_sparse_size(patches: _Patches, *, wanted: bool) -> None:
    def size_of_projection(original: Callable[..., Any]) -> Callable[..., Any]:
        def tensors(layer: Any, adapter: str, *, device: Any, dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
            U = layer.frod_U[adapter].to(device=device, dtype=dtype)
            V = layer.frod_V[adapter].to(device=device, dtype=dtype)
            indices = layer.frod_s_indices[adapter].to(device=device, dtype=torch.long)
            values = layer.frod_lambda_s_values[adapter].to(device=device, dtype=dtype)
            lambda_l = layer.frod_lambda_l[adapter].to(device=device, dtype=dtype)
            return U, V, torch.sparse_coo_tensor(indices, values, tuple(V.shape)).coalesce(), lambda_l

        return tensors

    owner = "peft.tuners.frod.layer:Linear._get_frod_tensors"
    patches.replace(owner, size_of_projection, since="0.20.0", wanted=wanted)


class _Answers:
    """Implementations of value-reading operators for fake tensors."""

    def __init__(self, patches: _Patches, yes: str, experts: int) -> None:
        self.patches = patches
        self.yes = yes
        self.experts = experts

    def operators(self) -> dict[Any, Callable[..., Any]]:
        implementations: dict[str, Callable[..., Any]] = {
            "_local_scalar_dense": self.scalar,
            "item": self.scalar,
            "equal": self.equal,
            "nonzero": self.positions,
            "_unique2": self.unique,
            "_coalesce": self.coalesced,
            "sparse_mask": self.masked,
            "_sparse_addmm": lambda mode, func, tensor, left, right, **_: _sparse_product(left, right),
            "mm": lambda mode, func, left, right: _sparse_product(left, right),
            "_grouped_mm": _grouped_product,
        }
        known = {getattr(torch.ops.aten, name, None): make for name, make in implementations.items()}
        return {packet.default: _within_mode(make) for packet, make in known.items() if packet is not None}

    def scalar(self, mode: Any, func: Any, tensor: Any) -> bool | int | float:
        if tensor.dtype is torch.bool:
            self.say("a question about values", self.yes or "no")
            return bool(self.yes)
        self.say("a number read from a tensor", "0")
        return 0.0 if tensor.dtype.is_floating_point else 0

    def equal(self, mode: Any, func: Any, left: Any, right: Any) -> bool:
        self.say("whether two tensors are equal", "no")
        return False

    def positions(self, mode: Any, func: Any, tensor: Any) -> torch.Tensor:
        count = tensor.numel()
        if self.experts and _asked_by().startswith("transformers."):
            self.patches.warn(f"Uniform routing assumed: each of the {self.experts} experts gets as many tokens.")
            # Which experts have tokens (1-D; some releases add a class for padding), or which tokens one expert has.
            count = min(count, self.experts) if tensor.dim() == 1 else -(-count // self.experts)
        else:
            self.say("the positions chosen by a mask", "all of them, an upper bound")
        # The operator writes the positions of one dimension after those of another.
        return torch.empty(tensor.dim(), count, dtype=torch.long).t()

    def unique(self, mode: Any, func: Any, tensor: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        self.say("the distinct values of a tensor", "one")
        return tensor.new_empty(1), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)

    def coalesced(self, mode: Any, func: Any, tensor: Any) -> torch.Tensor:
        indices, values = sparse_parts(tensor)
        return _sparse(torch.empty_like(indices), torch.empty_like(values), tensor)

    def masked(self, mode: Any, func: Any, tensor: Any, mask: Any) -> torch.Tensor:
        indices, values = sparse_parts(mask)
        return _sparse(torch.empty_like(indices), torch.empty(values.shape, dtype=tensor.dtype), mask)

    def say(self, question: str, answer: str) -> None:
        self.patches.warn(f"{_asked_by()} asks for {question}; answered: {answer}.")


def _within_mode(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Fake tensor implementations run outside their mode: what they make would be real."""

    def run(mode: Any, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return implementation(mode, *args, **kwargs)

    return run


def _sparse(indices: torch.Tensor, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return sparse_coo(
        like.sparse_dim(), like.dense_dim(), like.shape, indices, values,
        dtype=values.dtype, layout=torch.sparse_coo, device=like.device, is_coalesced=True,
    )  # fmt: skip


def _grouped_product(
    mode: Any, func: Any, left: Any, right: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """A product for each group of rows (or columns) that `offs` ends; torch's shape rule takes bfloat16 only."""
    shape = [left.shape[-2], right.shape[-1]]
    if left.dim() == right.dim():
        shape.insert(0, offs.shape[0] if left.dim() == 2 else left.shape[0])
    dtype = left.dtype if out_dtype is None else out_dtype
    row = -(-shape[-1] * dtype.itemsize // _GROUPED_ALIGNMENT) * _GROUPED_ALIGNMENT // dtype.itemsize
    strides = (row, 1) if len(shape) == 2 else (shape[-2] * row, row, 1)
    return torch.empty_strided(shape, strides, dtype=dtype)


def _sparse_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A dense product; without this, fake tensors would compute it on real zeros of the same sizes."""
    if left.layout is not torch.sparse_coo:
        return NotImplemented
    return right.new_empty(left.shape[0], right.shape[1])


@contextmanager
def _fake_operators(replaced: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    table = shape_rules()
    saved = {operator: table[operator] for operator in replaced if operator in table}
    table.update(replaced)
    try:
        yield
    finally:
        for operator in replaced:
            del table[operator]
        table.update(saved)


def _asked_by() -> str:
    """The nearest caller outside torch and this package: 'peft.tuners.loha.layer.forward'."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] != "torch" and not module.startswith(__package__):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "the step"


# Failing


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (*NEEDS_VALUES, NotImplementedError, GaugeError) as error:
        cause = _value_error(error)
        if cause is None or isinstance(error, CannotPlan):
            raise
        raise CannotPlan(_operation(cause)) from error


def _value_error(error: BaseException | None) -> BaseException | None:
    while error is not None and not isinstance(error, (*NEEDS_VALUES, NotImplementedError)):
        error = error.__cause__
    return error


def _operation(error: BaseException) -> str:
    operator = getattr(error, "func", None)
    if operator is not None:
        return f"{operator} needs the values of its input"
    return one_line(error, 160)
