import pytest

from mmasl.utils.markdown import markdown_table


def test_tables():
    rows = [['a', 1.5], ['bb', 'x|y']]
    assert markdown_table(rows, ['name', 'v']) == '| name | v |\n|---|---|\n| a | 1.5 |\n| bb | x\\|y |'
    assert markdown_table(rows, ['name', 'v'], aligned=True) == (
        '| name |    v |\n|------|------|\n| a    |  1.5 |\n| bb   | x\\|y |')
    assert markdown_table([], ['name']) == '| name |\n|---|'
    with pytest.raises(ValueError, match='shorter'):
        markdown_table([['a']], ['name', 'v'])
