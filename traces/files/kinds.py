"""Files that are no text, told by how they begin."""

from __future__ import annotations

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PAR1", "a Parquet file: write it as CSV (pandas: read_parquet(...).to_csv(..., index=False))"),
    (0, b"ARROW1", "an Arrow file: write it as CSV (pandas: read_feather(...).to_csv(..., index=False))"),
    (0, b"FEA1", "a Feather file: write it as CSV (pandas: read_feather(...).to_csv(..., index=False))"),
    (0, b"PK\x03\x04", "a ZIP archive (or an Excel workbook): unpack it, or save the sheet as CSV"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook: save the sheet as CSV"),
    (0, b"BZh", "a bzip2 archive: unpack it (bunzip2); gzip and zstd are read as they are"),
    (0, b"\xfd7zXZ\x00", "an xz archive: unpack it (unxz); gzip and zstd are read as they are"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 archive: unpack it (unlz4); gzip and zstd are read as they are"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it"),
    (257, b"ustar", "a tar archive: unpack it and name the trace in it"),
    (0, b"SQLite format 3", "an SQLite database: write the table as CSV"),
    (0, b"\x89HDF", "an HDF5 file: write it as CSV"),
    (0, b"\x93NUMPY", "a NumPy array: write it as CSV"),
    (0, b"\x80\x02", "a pickle: write it as CSV"),
    (0, b"\x80\x03", "a pickle: write it as CSV"),
    (0, b"\x80\x04", "a pickle: write it as CSV"),
    (0, b"\x80\x05", "a pickle: write it as CSV"),
    (0, b"%PDF", "a PDF"),
    (0, b"\xff\xfe\x00\x00", "UTF-32 text: save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (0, b"\x00\x00\xfe\xff", "UTF-32 text: save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (0, b"\xff\xfe", "UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (0, b"\xfe\xff", "UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (0, b"version https://git-lfs.github.com/", "a Git LFS pointer, not the file itself: git lfs pull fetches it"),
)


def foreign(head: bytes) -> str | None:
    """Name a file that cannot be a trace by its first bytes (300 are enough); None where it may be one."""
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head.lstrip()[:64].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file that it links to"
    if b"\x00" in head[:300]:
        return "binary data, not text"
    return None
