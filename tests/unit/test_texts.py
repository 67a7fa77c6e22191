"""Addresses, templates and expressions: what is refused at once, and what must not be."""

import pydantic
import pytest

from finetune_api.texts import Endpoint, ExpressionText, TemplateText


def accepts(kind: object, text: str) -> bool:
    try:
        pydantic.TypeAdapter(kind).validate_python(text)
    except pydantic.ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:5000",
        "http://localhost:80",
        "https://s3.eu-central-1.amazonaws.com",
        "http://minio.storage.svc:9000",
        "http://minio_1:9000/",
        "http://10.0.0.5",
        "https://10.20.30.40:9000/x",
        "https://metadata-store.example",
        "https://internal.example.",
        "http://[fd12::5]:9000",
        "https://store.0example.com/a/b",
        "http://s3",
    ],
)
def test_a_server_may_be_named_so(url: str) -> None:
    assert accepts(Endpoint, url)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/",
        "https://169.254.170.2:80/x",
        "http://169.254.169.254?a",
        "http://metadata/",
        "http://metadata.google.internal/computeMetadata",
        "http://metadata.google.internal./",
        "http://instance-data.ec2.internal",
        "http://100.100.100.200",
        "http://168.63.129.16/",
        "http://[fd00:ec2::254]/",
        "http://[fd00:0ec2::254]/",
        "http://[fe80::a9fe:a9fe]/",
        "http://[::ffff:a9fe:a9fe]",
        "http://[0:0:0:0:0:ffff:a9fe:a9fe]/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://0XA9FEA9FE/",
        "http://0251.0376.0251.0376/",
        "http://169.16689662/",
        "http://169.254.43518/",
        "http://0xa9.0xfe.0xa9.0xfe/",
        "http://user@example.com/",
        "http://example.com@169.254.169.254/",
        "http://a b",
        "http://",
        "ftp://example.com",
        "http://example.com:80:80/",
        "http://example.com\n",
    ],
)
def test_a_server_may_not_be_named_so(url: str) -> None:
    assert not accepts(Endpoint, url)


@pytest.mark.parametrize(
    "text",
    [
        "{{ instruction }}\n\n{{ input }}",
        "Fill: ____ {{ question }} ____",
        "{% for turn in turns %}{{ turn }}{% endfor %}",
        "{% if found %}{{ found }}{% else %}none{% endif %}",
        "def main():\n    if __name__ == '__main__': {{ code }}",
        "{{ attribute }} and {{ block | trim }}",
        "call \\x5f from {{ x }}",
        "{% set index = 3 %}{{ 'from' }}",
    ],
)
def test_a_template_may_say(text: str) -> None:
    assert accepts(TemplateText, text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ x.__class__ }}",
        "{{ x['__class__'] }}",
        "{{ x | attr('a') }}",
        "{{ x|attr('_' ~ '_class') }}",
        "{{ x['\\x5f'] }}",
        "{{ x['\\u005f'] }}",
        "{{ x['\\137'] }}",
        "{% include 'a' %}",
        "{%- import 'a' as b %}",
        "{% from 'a' import b %}",
        "{% extends 'a' %}",
        "{% set a = x.__class__ %}",
    ],
)
def test_a_template_may_not_say(text: str) -> None:
    assert not accepts(TemplateText, text)


def test_an_expression_may_compare_and_not_reach_for_more() -> None:
    for text in ("exact_match(completion, reference)", "words(completion) < 100", "numbers(completion)|sum / 3"):
        assert accepts(ExpressionText, text)
    for text in ("prompt.__class__", "prompt|attr('upper')", "prompt['\\x5f']", ""):
        assert not accepts(ExpressionText, text)
