"""Reads from a cubin what a kernel takes of a GPU: registers, shared memory, stack. Needs no GPU and no CUDA tool."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_REGISTERS, _FRAME_SIZE = 0x2F, 0x11  # attributes of the section .nv.info: EIATTR_REGCOUNT, EIATTR_FRAME_SIZE
_WITH_SIZE = 4  # format of an attribute whose value has a length


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel."""

    registers: int  # of a thread
    shared: int  # bytes that the kernel declares itself
    stack: int  # bytes of local memory of a thread; 0 = nothing is spilled


def read_resources(cubin: bytes, entry: str) -> Resources:
    """Return what kernel ``entry`` of the ELF64 file ``cubin`` takes. Raises KeyError if there is no such kernel."""
    sections = _sections(cubin)
    names = _symbol_names(cubin, sections)
    found = {kind: value for kind, symbol, value in _info(cubin, sections) if names[symbol] == entry}
    if _REGISTERS not in found:
        raise KeyError(entry)
    shared = sections.get(f".nv.shared.{entry}")
    return Resources(found[_REGISTERS], shared[5] if shared else 0, found.get(_FRAME_SIZE, 0))


def _sections(cubin: bytes) -> dict[str, tuple[int, ...]]:
    """Section name → its header: name, type, flags, address, offset, size, link, info, alignment, entry size."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    return {_text(cubin, headers[names], header[0]): header for header in headers}


def _text(cubin: bytes, strings: tuple[int, ...], offset: int) -> str:
    start = strings[4] + offset
    return cubin[start : cubin.index(b"\0", start)].decode()


def _symbol_names(cubin: bytes, sections: dict[str, tuple[int, ...]]) -> list[str]:
    table, strings = sections[".symtab"], sections[".strtab"]
    places = range(table[4], table[4] + table[5], table[9])
    return [_text(cubin, strings, struct.unpack_from("<I", cubin, place)[0]) for place in places]


def _info(cubin: bytes, sections: dict[str, tuple[int, ...]]) -> Iterator[tuple[int, int, int]]:
    """Yield (attribute, symbol, value) of what the file says about its kernels."""
    header = sections[".nv.info"]
    info = cubin[header[4] : header[4] + header[5]]
    at = 0
    while at < len(info):
        kind, attribute, length = struct.unpack_from("<BBH", info, at)
        if kind == _WITH_SIZE and attribute in (_REGISTERS, _FRAME_SIZE):
            yield attribute, *struct.unpack_from("<II", info, at + 4)
        at += 4 + (length if kind == _WITH_SIZE else 0)
