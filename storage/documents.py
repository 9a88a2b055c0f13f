"""JSON and Parquet objects as they are read back: what isn't as it was written is refused by its name.

An object may be cut short by a full disk, edited by hand, or put there by another program. Everything that is read back,
except chunks of features (storage/reader.py), comes through here, so that the message always says which object is wrong.
"""

import contextlib
import functools
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import pyarrow as pa
import pyarrow.parquet as pq

from storage.paths import Folder, StorageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    JsonValue: TypeAlias = bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
    """What a JSON document holds; dataclasses with fields of it are read and written as they are."""
else:
    # Recursive aliases can't be resolved in other modules' annotations: `decode`, which reads those, takes any value here.
    JsonValue = object

T = TypeVar("T")
Record = TypeVar("Record", bound="DataclassInstance")

JsonObject: TypeAlias = Mapping[str, JsonValue]
"""A JSON object whose names aren't all known: settings, attributes, lines of measurements."""


class DamagedObject(StorageError):
    """An object is not what was written under its name; the message names it and says what to do."""


class MissingObject(DamagedObject, FileNotFoundError):
    """An object that must be there isn't."""


@dataclass(frozen=True)
class Document:
    """An object that is to be read, and what to do where it's damaged, in words that follow a semicolon."""

    folder: Folder
    name: str
    advice: str = "restore it from a copy"
    error: type[DamagedObject] = DamagedObject

    @property
    def displayed(self) -> str:
        """Its URL as it may be printed."""
        return f"{self.folder.displayed}/{self.name}"

    def damaged(self, what: str) -> DamagedObject:
        """The error that says `what` is wrong with it."""
        return self.error(f"{self.displayed} {what}; {self.advice}")

    def missing(self) -> MissingObject:
        """The error that says that it isn't there."""
        return MissingObject(f"{self.displayed} is missing; {self.advice}")

    @contextlib.contextmanager
    def parsing(self) -> Iterator[None]:
        """Turn whatever parsers and checks raise into a `DamagedObject`. What the disk or the network raises passes."""
        try:
            yield
        except DamagedObject:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise self._unreadable(error) from None
        except (pa.ArrowException, pa.lib.ArrowMemoryError) as error:
            raise self._unreadable(error) from None
        except OSError as error:
            # Arrow's reader has this type for what it can't parse; the operating system's errors have a number.
            if error.errno is not None or type(error) is not OSError:
                raise
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> DamagedObject:
        return self.damaged(f"is damaged or was edited ({type(error).__name__}: {str(error).strip()[:300]})")

    # Before `bytes`, as which annotations below would read the type of that name.
    def table(self, schema: pa.Schema, optional: Sequence[str] = (), *, data: bytes | None = None) -> pa.Table:
        """The Parquet table in it, with exactly the columns of `schema`; those of `optional` are null where it lacks them.
        `data`: its bytes, or the part of them that the table is, where they were read.

        Raises `MissingObject` and `DamagedObject`.
        """
        data = self.bytes() if data is None else data
        with self.parsing():
            table = parquet_table(data)
            require_columns(table.schema, schema, optional)
            return with_columns(table, schema)

    def bytes(self) -> bytes:
        """Raises `MissingObject`."""
        try:
            return self.folder.read(self.name)
        except FileNotFoundError:
            raise self.missing() from None
        except IsADirectoryError:
            raise self.damaged("is a folder where a file must be") from None

    def json(self, *, nan: bool = True) -> dict[str, JsonValue]:
        """The JSON object in it. Raises `MissingObject` and `DamagedObject`."""
        data = self.bytes()
        with self.parsing():
            return parse_json(data, nan=nan)


def parquet_table(data: bytes) -> pa.Table:
    """The table in a Parquet file's bytes, its checksums verified. Raises what pyarrow does where it is none."""
    # In this thread: one of Arrow's may let go of the bytes last, and where the interpreter has ended by then, that aborts the
    # process after all was done ("terminate called without an active exception", seen with pyarrow 26).
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)


def parse_json(data: bytes | str, *, nan: bool = True) -> dict[str, JsonValue]:
    """A JSON object; NaN and infinity, which measured values may be, only with `nan`. Raises `ValueError`."""
    found = json.loads(data, parse_constant=None if nan else _refuse_constant)
    if not isinstance(found, dict):
        raise ValueError(f"a JSON object was expected, not {_short(found)}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


# --- typed values -----------------------------------------------------------------------------------------------------


@overload
def decode(kind: type[T], value: object, where: str = "") -> T: ...
@overload
def decode(kind: object, value: object, where: str = "") -> object: ...
def decode(kind: object, value: object, where: str = "") -> object:
    """`value`, as JSON has it, as `kind`: a dataclass, or a type as its fields are annotated. Lists become tuples.

    `where` names the value in messages. Raises `ValueError` that says where what isn't as it must be: names that are missing
    or unknown, wrong types.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind in (object, Any):  # `JsonValue`, too
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_fields(kind, value, where)
    if origin in (Union, types.UnionType):
        return _decode_union(parts, value, where)
    if origin is Literal:
        if not any(value is part or value == part for part in parts):
            raise _unfit(" or ".join(map(repr, parts)), value, where)
        return value
    if origin is tuple:
        return _decode_tuple(parts, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: decode(parts[1], each, _inside(where, name)) for name, each in as_object(value, where).items()}
    assert isinstance(kind, type), f"no JSON value is a {kind}"
    # Python counts bool as an int, and JSON's writers drop the point of a whole float.
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise _unfit(kind.__name__, value, where)
    return value


def decode_known(kind: type[Record], value: object, where: str = "") -> Record:
    """`decode` of the names that the dataclass `kind` has; others are left out."""
    names = {f.name for f in fields(kind)}
    return decode(kind, {name: each for name, each in as_object(value, where).items() if name in names}, where)


def as_object(value: object, where: str = "") -> dict[str, JsonValue]:
    """`value`, if it's a JSON object. Raises `ValueError`."""
    if not isinstance(value, dict):
        raise _unfit("an object", value, where)
    return value


@functools.cache
def _fields_of(kind: "type[DataclassInstance]") -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a dataclass's fields by name, and the names without a default."""
    hints, needed = get_type_hints(kind), (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    return {f.name: hints[f.name] for f in fields(kind)}, frozenset(needed)


def _decode_fields(kind: "type[DataclassInstance]", value: object, where: str) -> object:
    found, (hints, needed) = as_object(value, where), _fields_of(kind)
    if missing := sorted(needed - found.keys()):
        raise ValueError(f"{where or 'it'} lacks {', '.join(missing)}")
    if unknown := sorted(found.keys() - hints.keys()):
        raise ValueError(f"{where or 'it'} has {', '.join(unknown)}, which this version doesn't know")
    return kind(**{name: decode(hints[name], each, _inside(where, name)) for name, each in found.items()})


def _decode_union(parts: Sequence[object], value: object, where: str) -> object:
    if value is None and types.NoneType in parts:
        return None
    kinds = [part for part in parts if part is not types.NoneType]
    for kind in kinds[:-1]:
        with contextlib.suppress(ValueError):
            return decode(kind, value, where)
    # The last one's message is the one that is seen.
    return decode(kinds[-1], value, where)


def _decode_tuple(parts: Sequence[object], value: object, where: str) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise _unfit("a list", value, where)
    if parts[-1] is Ellipsis:
        parts = [parts[0]] * len(value)
    if len(parts) != len(value):
        raise _unfit(f"a list of {len(parts)}", value, where)
    return tuple(decode(part, each, f"{where}[{i}]") for i, (part, each) in enumerate(zip(parts, value, strict=True)))


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _unfit(wanted: str, value: object, where: str) -> ValueError:
    return ValueError(f"{where or 'it'} must be {wanted}, not {_short(value)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- tables -----------------------------------------------------------------------------------------------------------


def require_columns(found: pa.Schema, wanted: pa.Schema, optional: Sequence[str] = ()) -> None:
    """Raise `ValueError` unless `found` has the columns of `wanted`, in types of their kinds, and no others."""
    if len(set(found.names)) != len(found.names):
        raise ValueError("it has several columns of one name")
    for name in wanted.names:
        if name not in found.names:
            if name in optional:
                continue
            raise ValueError(f"it has no column {name}")
        if not _fits(found.field(name).type, wanted.field(name).type):
            raise ValueError(f"its column {name} is {found.field(name).type}, not {wanted.field(name).type}")
    if unknown := [name for name in found.names if name not in wanted.names]:
        raise ValueError(f"it has columns that don't belong there: {', '.join(unknown)}")


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of one type can be of the other: tools that rewrite a table without its schema choose other widths, and
    none for a column without values."""
    kinds = (pa.types.is_integer, pa.types.is_floating)
    return found in (wanted, pa.null()) or any(kind(found) and kind(wanted) for kind in kinds)


def with_columns(table: pa.Table, wanted: pa.Schema) -> pa.Table:
    """`table` with the columns of `wanted` in their order, null where it lacks one; its metadata stays."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in wanted
    ]
    return pa.table(columns, schema=wanted.with_metadata(table.schema.metadata))


def schema_of(kind: type[Record], **others: pa.DataType) -> pa.Schema:
    """The columns of a dataclass of strings and numbers, or None; `others`: of types that aren't the usual ones."""
    kinds = {name: (*get_args(hint), hint)[0] for name, hint in get_type_hints(kind).items()}
    return pa.schema([(f.name, others.get(f.name) or _ARROW[kinds[f.name]]) for f in fields(kind)])


def rows_as(kind: type[Record], table: pa.Table) -> list[Record]:
    """Rows of a table as dataclasses of strings and numbers. Raises `ValueError` for names, types and nulls that don't fit.

    By columns, since there may be a million rows.
    """
    require_columns(table.schema, schema_of(kind), [f.name for f in fields(kind) if f.default is not MISSING])
    if nulls := [name for name in table.column_names if table[name].null_count]:
        raise ValueError(f"its column {nulls[0]} has nulls")
    return [kind(**row) for row in table.to_pylist()]


_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
