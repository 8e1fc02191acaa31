"""Weights out of a checkpoint: formats, renames, dtypes; streamed, atomic, read back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, SupportsIndex, TypeAlias, TypedDict, Unpack

import msgspec
import torch

from dist_ckpt.doors.content import Item, Outgoing, StoredContent, dtype_to_cast
from dist_ckpt.doors.image import Archive, Drawing, Image, draw_archive, whole_storage
from dist_ckpt.doors.pickling import Built, Call, Name, Pairs, pickled
from dist_ckpt.doors.placing import OutFile, place_folder, place_one
from dist_ckpt.errors import ErrorKind, IncompatibleError, NotFound, UsageError
from dist_ckpt.format.files import DTYPES, ShardEntry, layout
from dist_ckpt.loading.opened import OpenedCheckpoint, open_checkpoint
from dist_ckpt.options import check_known
from dist_ckpt.repository.destination import as_destination, check_new_files
from dist_ckpt.repository.ranking import Mode
from dist_ckpt.state.layout import dtype_name
from dist_ckpt.storage.base import Store, Stream, read_all
from dist_ckpt.storage.resolve import Place, as_text, check_options_taken, options_for, resolved

_INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS_FILE = "model.safetensors"

Format: TypeAlias = Literal["safetensors", "hf", "torch", "dcp"]
FORMATS: tuple[Format, ...] = ("safetensors", "hf", "torch", "dcp")

WhichStep: TypeAlias = SupportsIndex | Literal["latest", "best"] | None

# What a file is called where the place is a folder, and by which ends a place is a file.
_ONE_FILES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "safetensors": (_WEIGHTS_FILE, (".safetensors",)),
    "torch": ("model.pt", (".pt", ".pth", ".bin", ".ckpt")),
}
_MAX_SHARD_BYTES = 5 * 10**9
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_CONFIG = "config.json"
# What transformers keeps beside the weights, none of which depends on them.
# Matched as a whole: weights that lie there too, or scripts, are never copied along.
_BESIDE = re.compile(
    r"generation_config\.json|tokenizer\.model|.*tokenizer.*\.json|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece.*\.model|"
    r"chat_template\.(jinja|json)|(pre)?processor_config\.json"
)
_BESIDE_LIMIT_BYTES = 1 << 28


class ExportKeywords(TypedDict):
    """The further keywords of `dist_ckpt.export`."""

    metric: NotRequired[str | None]
    mode: NotRequired[Mode]
    max_shard: NotRequired[int | str | None]
    like: NotRequired[Place | None]
    storage_options: NotRequired[Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and where.

    Attributes:
        url: the file or folder.
        format: of which format it is.
        step: of the checkpoint; 0 where it has none.
        files: sizes in bytes by key.
        tensors: how many names there are.
        nbytes: of all tensors.
        aliases: names that were left out since another has their memory, with that name.
        left_out: Python values of the part, which no such format holds.
    """

    url: str
    format: str
    step: int
    files: Mapping[str, int]
    tensors: int
    nbytes: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it for people."""
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        head = f"exported step {self.step} to {self.url} ({self.format}): {self.tensors} tensors"
        lines = [f"{head}, {self.nbytes} bytes, {files}, read back"]
        lines += [f"  {name} is {other}" for name, other in self.aliases.items()]
        lines += [f"  left out, as it is no tensor: {name}" for name in self.left_out]
        return "\n".join(lines)


def export(
    source: Place,
    out: Place,
    *,
    format: Format = "safetensors",  # noqa: A002  the word for it everywhere
    part: str = "model",
    step: WhichStep = None,
    dtype: str | torch.dtype | None = None,
    rename: Mapping[str, str] | None = None,
    **options: Unpack[ExportKeywords],
) -> ExportReport:
    """Write the tensors of one part to a format of others, read it back, and compare.

    One process does it, in some 100 MB of memory whatever the model measures, twice that to cast.
    The destination appears whole or not at all; where it was cut off, the same call goes on.

    ```python
    import dist_ckpt
    import torch
    from safetensors.torch import load_file

    model = torch.nn.Linear(4, 8)
    dist_ckpt.save({"model": model}, "runs/17")
    dist_ckpt.export("runs/17", "weights.safetensors")
    assert torch.equal(load_file("weights.safetensors")["weight"], model.weight)
    ```

    Args:
        source: a run, one of its step directories, or whatever `open_checkpoint` opens.
        out: a path or URL where nothing is yet: a file, by its ending (`.safetensors`; `.pt`,
            `.pth`, `.bin`, `.ckpt`), or the folder for one; for "hf" and "dcp" the folder.
        format: "safetensors", one file; "hf", as transformers and the hub have it, several files
            with an index where one would be too large; "torch", what `torch.load` reads with
            `weights_only=True`; "dcp", a directory of stock `torch.distributed.checkpoint`.
        part: which part.
        step: which checkpoint of a run: its number, "best", or "latest".
        dtype: "bfloat16", "float16", "float32" or "float64": what floating tensors are cast to.
        rename: patterns to names, as `{"net.*": "model.*"}`, or beginnings up to a dot.
        **options: `metric` and `mode`, by which a checkpoint is the best; for "hf" `max_shard`, the
            most bytes of a file (5 GB; `"500MB"`), and `like`, a folder whose `config.json` and
            tokenizer files are copied; `storage_options` for each place that takes any.

    Returns:
        What was written.

    Raises:
        NotFound: there is no such checkpoint, or no such part in it.
        AlreadyExists: the destination exists, and is no beginning of the same work.
        IntegrityError: the source is damaged, or what was written reads otherwise.
        IncompatibleError: the format, or the dtype, cannot hold a tensor.
        UsageError: an argument is malformed, a pattern matches nothing, or `out` is in a run.
        StorageError: the destination is full, or failed.
    """
    check_known(options, list(ExportKeywords.__annotations__), besides=_ARGUMENTS, verb="export")
    chosen = ExportChoice.of(format, options)
    cast = dtype_to_cast(dtype)
    check_options_taken(chosen.storage_options, source, out, chosen.like)
    with open_at(source, step, options) as opened:
        content = StoredContent(opened, part, dtype=cast, rename=rename)
        return _export(opened, content, out, chosen, cast=cast)


def _export(
    opened: OpenedCheckpoint,
    content: StoredContent,
    out: Place,
    choice: ExportChoice,
    *,
    cast: torch.dtype | None,
) -> ExportReport:
    # The save id too: a step that was saved anew is other work than what was cut off.
    work = {
        "source": opened.where,
        "save": None if opened.manifest is None else opened.manifest.save_id,
        "part": content.part,
        "dtype": None if cast is None else dtype_name(cast),
        # Names stand for the patterns: what these come to is what has to be the same.
        "names": list(content.items),
    }
    # The value of a dict of tensors says only where these stand: nothing is left out with it.
    values = () if content.is_value else opened.read_encoded(content.part)
    left_out = tuple(sorted(values))
    return write_content(
        content, out, choice, work=work, step=opened.step, left_out=left_out, cast=cast
    )


_ARGUMENTS = ("source", "out", "format", "part", "step", "dtype", "rename")


def open_at(source: Place, step: WhichStep, options: Mapping[str, Any]) -> OpenedCheckpoint:
    """Open what `source` and `step` name; see `export`."""
    which: SupportsIndex | Literal["best"] | None
    # None is what `open_checkpoint` has for the newest.
    which = None if isinstance(step, str) and step == "latest" else step
    metric, mode = options.get("metric"), options.get("mode", "min")
    given = options_for(source, options.get("storage_options"))
    return open_checkpoint(source, step=which, metric=metric, mode=mode, storage_options=given)


@dataclass(frozen=True, slots=True)
class ExportChoice:
    """How to write.

    Attributes:
        format: of the files.
        max_shard_bytes: the most that a file of "hf" holds.
        like: the folder that "hf" takes its configuration from.
        storage_options: for each place that takes any.
    """

    format: Format
    max_shard_bytes: int = _MAX_SHARD_BYTES
    like: Place | None = None
    storage_options: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, format: object, options: Mapping[str, Any]) -> ExportChoice:  # noqa: A002
        """Return what the keywords of a call mean.

        Raises:
            UsageError: there is no such format, or an option is malformed or of another one.
        """
        if format not in FORMATS:
            raise UsageError(f"format is one of {', '.join(FORMATS)}, not {format!r}")
        # It would be passed over in silence by the other formats.
        for name in ("max_shard", "like"):
            if options.get(name) is not None and format != "hf":
                raise UsageError(f"{name} goes with format='hf', not with {format!r}")
        max_shard = options.get("max_shard")
        nbytes = _MAX_SHARD_BYTES if max_shard is None else parse_bytes(max_shard)
        return cls(format, nbytes, options.get("like"), options.get("storage_options"))


def parse_bytes(size: object) -> int:
    """Return a number of bytes, or the one that a text as `5GB` or `512MiB` means.

    Raises:
        UsageError: it means none, or no byte.
    """
    # A bool is an int to Python, and `True` would be a file for each byte.
    nbytes = size if isinstance(size, int) and not isinstance(size, bool) else 0
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is not None:
        power = " kmgt".index(found[2].lower() or " ")
        nbytes = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if nbytes < 1:
        raise UsageError(f"{size!r} is no size: give bytes, or a text such as '5GB' or '512MiB'")
    return nbytes


def write_content(
    content: Outgoing,
    out: Place,
    choice: ExportChoice,
    *,
    work: Mapping[str, Any],
    step: int = 0,
    left_out: tuple[str, ...] = (),
    cast: torch.dtype | None = None,
) -> ExportReport:
    """Write `content` to `out`; see `export`.

    Args:
        content: the tensors.
        out: where to.
        choice: how.
        work: what tells this export from others.
        step: for the report.
        left_out: for the report.
        cast: what the tensors were cast to, for the configuration.
    """
    folder, key, named = _destination(out, choice)
    given = options_for(out, choice.storage_options)
    with as_destination(), resolved(folder, storage_options=given) as store:
        check_new_files(store, given, named=named)
        # Drawn before anything is put: what the format cannot hold leaves no beginning behind.
        files, aliases = _files(content, choice, key, cast)
        if key is not None:
            place_one(store, files[0])
        else:
            about = {"format": choice.format, "max_shard": choice.max_shard_bytes}
            place_folder(store, files, {**work, **about})
        return ExportReport(
            f"{store.url}/{key}" if key is not None else store.url,
            choice.format,
            step,
            {file.key: file.stream.nbytes for file in files},
            len(content.items),
            sum(item.nbytes for item in content.items.values()),
            aliases,
            left_out,
        )


def _destination(out: Place, choice: ExportChoice) -> tuple[Place, str | None, bool]:
    """Return the folder, the key if it is one file, and whether its name was given."""
    default, suffixes = _ONE_FILES.get(choice.format, (None, ()))
    if isinstance(out, Store):
        return out, default, False
    text = as_text(out)
    head, slash, name = text.rpartition("/")
    # `.pt` alone is the name of a hidden folder, not a file by its ending.
    if default is not None and name.endswith(suffixes) and name not in suffixes:
        # A file at the root has no head, and one right here no slash either.
        return head or slash or ".", name, True
    # Who names a file means no folder of that name; a directory of stock may be called anything.
    for other, (_, endings) in _ONE_FILES.items() if choice.format != "dcp" else ():
        if name.endswith(endings) and name not in endings:
            raise UsageError(
                f"{name} has the ending of format={other!r}, and this is format={choice.format!r}: "
                "give that format, or another name"
            )
    return text, default, False


def _files(
    content: Outgoing, choice: ExportChoice, key: str | None, cast: torch.dtype | None
) -> tuple[list[OutFile], Mapping[str, str]]:
    """Return the files in the order in which they are put, and the names left out of them."""
    items = content.items

    def drawn(draw: Callable[[], Image]) -> Stream:
        return Drawing(draw, content).stream()

    if choice.format == "torch":
        assert key is not None
        return [OutFile(key, drawn(draw_archive(items, content.ties)))], {}
    if choice.format == "dcp":
        metadata = _describe_data(items, _draw_data(items)[1])
        data = drawn(lambda: _draw_data(items)[0])
        # DCP's reader begins with `.metadata`: while that is missing nobody takes it for whole.
        return [OutFile(_DATA_FILE, data), _small(_METADATA_FILE, metadata)], {}
    _check_dtypes(items.values())
    if choice.format == "safetensors":
        assert key is not None
        # Ties are written out: whoever reads the file by names finds every one of them.
        return [OutFile(key, drawn(_draw_shard(list(items.values()), {})))], {}
    aliases = aliases_of(content.ties)
    # By name: the files keep no other order, and an import of them would be cut otherwise.
    kept = [item for name, item in sorted(items.items()) if name not in aliases]
    shards = _cut_shards(kept, choice.max_shard_bytes)
    # In front of the weights: without these, nothing loads a folder that has a configuration.
    files = _configuration(choice, cast)
    for name, shard in zip(_shard_names(len(shards)), shards, strict=True):
        files.append(OutFile(name, drawn(_draw_shard(shard, _of(shard, aliases)))))
    # The index last: shards alone are found by no reader, so half of them is no model.
    if len(shards) > 1:
        files.append(_small(_INDEX_FILE, _weight_index(shards)))
    return files, aliases


def _of(shard: list[Item], aliases: Mapping[str, str]) -> dict[str, str]:
    names = {item.name for item in shard}
    return {name: other for name, other in aliases.items() if other in names}


def _small(key: str, data: bytes) -> OutFile:
    return OutFile(key, Stream.of([memoryview(data)]))


def _configuration(choice: ExportChoice, cast: torch.dtype | None) -> list[OutFile]:
    """Return what stands beside the weights, of the folder `choice.like`.

    Raises:
        NotFound: it has no configuration.
    """
    like = choice.like
    if like is None:
        return []
    options = options_for(like, choice.storage_options)
    with resolved(like, storage_options=options) as store:
        names = [name for name in store.list_children() if _BESIDE.fullmatch(name)]
        found = {name: read_all(store, name, limit_bytes=_BESIDE_LIMIT_BYTES) for name in names}
        # By its name and not from the list: where it is missing, the call must fail.
        try:
            config = read_all(store, _CONFIG, limit_bytes=_BESIDE_LIMIT_BYTES)
        except NotFound as error:
            raise NotFound(f"{store.url} has no {_CONFIG} to copy: name a folder of one") from error
    found[_CONFIG] = config if cast is None else _of_dtype(config, cast)
    return [_small(name, data) for name, data in sorted(found.items()) if data]


def _of_dtype(config: bytes, cast: torch.dtype) -> bytes:
    """Return a configuration that says which dtype the weights have now."""
    try:
        fields = msgspec.json.decode(config, type=dict[str, Any])
    # Nested too deep, msgspec raises RecursionError; the folder may be anybody's.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UsageError(f"{_CONFIG} is no JSON object: {error}") from error
    # Newer transformers say `dtype`, older `torch_dtype`; both at once could contradict each other.
    key = "dtype" if "dtype" in fields else "torch_dtype"
    fields[key] = dtype_name(cast)
    return msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"


# Shards of safetensors, with their index.


# What heads are called that share their weights with the embedding below.
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|proj_out|decoder|generator)\.\w+$"
)
# T5 and BART tie encoder, decoder and head to one embedding of this name.
_SHARED = re.compile(r"(^|\.)shared\.\w+$")


def _check_dtypes(items: Iterable[Item]) -> None:
    """Check that safetensors has the dtypes of `items`.

    Raises:
        IncompatibleError: it has not.
    """
    for item in items:
        name = dtype_name(item.dtype)
        code, _ = DTYPES.get(name, ("U8", 1))
        # Our own files keep such a dtype as bytes (U8); others would take these for numbers.
        if code == "U8" and name != "uint8":
            raise IncompatibleError(
                f"{item.name} has the dtype {name}, which safetensors does not know: export with "
                "format='torch' or 'dcp'",
                kind=ErrorKind.STATE_MISMATCH,
            )


def _draw_shard(items: Sequence[Item], aliases: Mapping[str, str]) -> Callable[[], Image]:
    """Return what draws the file of `items`.

    Args:
        items: in any order.
        aliases: names that are left out, and the item that has their memory.
    """
    entries = [ShardEntry(item.name, dtype_name(item.dtype), item.shape) for item in items]
    # As transformers asks for it, and as `safetensors.torch.save_model` notes what it leaves out.
    placed = layout(entries, {"format": "pt", **dict(sorted(aliases.items()))})
    # As `layout` placed them: spans of an image ascend.
    order = sorted(zip(placed.offsets, items, strict=True), key=lambda pair: pair[0])

    def draw() -> Image:
        image = Image()
        image.add_bytes(placed.header)
        for _, item in order:
            image.add_tensor(item)
        return image

    return draw


def aliases_of(ties: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Return for each tied name that is left out the one that is kept.

    Transformers keeps the embedding and ties the head to it anew: a file that had the head alone
    would be loaded with a new embedding.
    """
    found: dict[str, str] = {}
    for group in ties:
        names = sorted(name for name in group if not _HEAD.search(name)) or sorted(group)
        kept = next((name for name in names if _SHARED.search(name)), names[0])
        found |= {name: kept for name in group if name != kept}
    return found


def _cut_shards(items: Iterable[Item], max_bytes: int) -> list[list[Item]]:
    """Return `items` in shards of at most `max_bytes`; a tensor that is larger has one of its own.

    The order is kept.
    """
    shards: list[list[Item]] = [[]]
    nbytes = 0
    # One pass, nothing moved to fill gaps: then the cut depends on names and sizes alone.
    for item in items:
        if shards[-1] and nbytes + item.nbytes > max_bytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(item)
        nbytes += item.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    """Return what the shards are called."""
    if count == 1:
        return [_WEIGHTS_FILE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _weight_index(shards: Sequence[Sequence[Item]]) -> bytes:
    """Return the index of several shards."""
    names = _shard_names(len(shards))
    files = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
    total = sum(item.nbytes for shard in shards for item in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    return msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n"


# A directory as `torch.distributed.checkpoint.save` writes it: `.distcp` files and `.metadata`.


_DATA_FILE = "__0_0.distcp"
_METADATA_FILE = ".metadata"
_CLASSES = "torch.distributed.checkpoint.metadata"
_ALIGN_BYTES = 64


def _draw_data(items: Mapping[str, Item]) -> tuple[Image, dict[str, tuple[int, int]]]:
    """Return the image of the one data file, and by name where in it a tensor's archive lies."""
    image = Image()
    places: dict[str, tuple[int, int]] = {}
    for name, item in items.items():
        image.skip_to(image.nbytes + -image.nbytes % _ALIGN_BYTES)
        start = image.nbytes
        Archive(image).add(whole_storage(item, 0), [item])
        places[name] = start, image.nbytes - start
    return image, places


def _describe_data(items: Mapping[str, Item], places: Mapping[str, tuple[int, int]]) -> bytes:
    """Return the `.metadata` of that file: a pickle of what DCP plans a load by."""
    fields = {
        "state_dict_metadata": {name: _tensor(item) for name, item in items.items()},
        # Each name is one key of a flat state dict, whatever dots are in it.
        "planner_data": {name: (name,) for name in items},
        "storage_data": Pairs(
            tuple((_index(item), _place(*places[name])) for name, item in items.items())
        ),
        "storage_meta": None,
    }
    return pickled(Built(Name(_CLASSES, "Metadata"), fields))


def _tensor(item: Item) -> Built:
    dtype = Name("torch", dtype_name(item.dtype))
    # As torch.serialization has copyreg pickle a layout: by its text.
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Name(_CLASSES, "_MEM_FORMAT_ENCODING"), (0,))
    # dtype, layout, requires_grad, memory format, pin_memory: `TensorProperties.__getstate__`.
    properties = (dtype, layout, False, contiguous, False)
    whole = {"offsets": _size((0,) * len(item.shape)), "sizes": _size(item.shape)}
    fields = {
        "properties": Built(Name(_CLASSES, "TensorProperties"), properties),
        "size": _size(item.shape),
        "chunks": [Built(Name(_CLASSES, "ChunkStorageMetadata"), whole)],
    }
    return Built(Name(_CLASSES, "TensorStorageMetadata"), fields)


def _index(item: Item) -> Built:
    # `index` is a hint, which takes no part in the comparison of two.
    fields = {"fqn": item.name, "offset": _size((0,) * len(item.shape)), "index": 0}
    return Built(Name(_CLASSES, "MetadataIndex"), fields)


def _place(offset: int, nbytes: int) -> Built:
    # Newer torch has `transform_descriptors`, too, which it leaves out of a pickle while None.
    fields = {"relative_path": _DATA_FILE, "offset": offset, "length": nbytes}
    return Built(Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), fields)


def _size(sizes: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (sizes,))
