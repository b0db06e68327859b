"""Writes Markdown tables and the generated blocks of documents."""
import re
from collections.abc import Callable, Iterable, Mapping, Sequence


def markdown_table(rows: Iterable[Sequence[object]], columns: Sequence[str], aligned: bool = False) -> str:
    """Format rows as a Markdown table.

    Args:
        rows: Cells of each row, one for each column. ``str`` is applied to each, and ``|`` is escaped.
        columns: Headings.
        aligned: Whether to pad the cells for reading as plain text. The first column is aligned to the left, the
            others to the right.

    Returns:
        The table, without a newline at its end.

    Raises:
        ValueError: The rows differ in their number of cells.
    """
    lines = [[str(cell).replace('|', r'\|') for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*lines, strict=True)]
    head, *body = (f'| {" | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])} |'
                   for line in lines)
    return '\n'.join([head, '|' + '|'.join('-' * max(3, width + 2) for width in widths) + '|', *body])


def fill_blocks(text: str, makers: Mapping[str, Callable[[str], str]]) -> str:
    """Replace the generated blocks of a document.

    A block starts with a line ``<!-- KIND: ARGUMENT -->`` and ends with ``<!-- end -->``.

    Args:
        text: The document.
        makers: Functions by kind, which make a block's content from its argument. Blocks of other kinds do not change.

    Returns:
        The document with the new blocks.
    """
    def fill(match: re.Match) -> str:
        opening, kind, argument = match.groups()
        return f'{opening}{makers[kind](argument)}\n<!-- end -->' if kind in makers else match[0]

    return re.sub(r'(<!-- (\w+): ([^>]*?) -->\n).*?<!-- end -->', fill, text, flags=re.DOTALL)
