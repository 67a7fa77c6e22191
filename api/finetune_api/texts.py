"""Texts that somebody acts upon, and what they must not say: addresses of servers, templates, expressions.

Each is checked here and, by the same regular expression, by the API server. What runs a template or talks to a server
has defences of its own; these refuse the plain attempts at once, and say why.
"""

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field, StringConstraints
from pydantic.config import JsonDict


class _Forbidden(NamedTuple):
    """Regular expressions, in the syntax that Python and RE2 share, of which none may match; and what is said then."""

    patterns: tuple[str, ...]
    message: str

    def check(self, text: str) -> str:
        if any(re.search(pattern, text) for pattern in self.patterns):
            raise ValueError(self.message)
        return text

    def schema(self) -> JsonDict:
        quoted = [pattern.replace("\\", "\\\\").replace("'", "\\'") for pattern in self.patterns]
        return {
            "x-kubernetes-validations": [
                {"rule": f"!self.matches('{pattern}')", "message": self.message} for pattern in quoted
            ]
        }


_END = "([:/?#]|$)"
_NODES = _Forbidden(
    (
        "^https?://("
        # Metadata services of clouds, and of the node itself.
        rf"169[.]254[.]|100[.]100[.]100[.]200{_END}|168[.]63[.]129[.]16{_END}|192[.]0[.]0[.]192{_END}"
        rf"|metadata([.]google[.]internal)?[.]?{_END}|instance-data([.]ec2[.]internal)?[.]?{_END}"
        r"|\[fe[89ab]|\[fd00:0?ec2:|\[[0:]*ffff:"
        # What some resolvers take for an address though it is not written as one: 2852039166, 0xa9fea9fe, 169.16689662.
        rf"|[0-9]+[.]?{_END}|[0-9]+[.][0-9]+[.]?{_END}|[0-9]+[.][0-9]+[.][0-9]+[.]?{_END}"
        rf"|([^/:?#]*[.])?0[0-9]+([.][0-9]+)*[.]?{_END}|([^/:?#]*[.])?0[xX][0-9A-Fa-f]*([.][0-9A-Za-z]+)*[.]?{_END})",
    ),
    "a metadata service or an address in disguise is not a server for this; name it by its host name or address",
)
Endpoint = Annotated[
    str,
    StringConstraints(
        pattern=r"^https?://([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?[.]?|\[[0-9a-f:]+\])(:[0-9]{1,5})?(/[^\s]*)?$",
        max_length=1024,
    ),
    Field(json_schema_extra=_NODES.schema()),
    AfterValidator(_NODES.check),
]
"""`http(s)://host[:port][/path]`: no user, no query, and no address that only a node should see."""

_INNER = _Forbidden(
    # Short ones: what a rule may cost is bounded over all lists that it is in, and their length counts.
    (r"[{][^}]*__", r"[{][^}]*\\[xuN0-9]", r"[{][^}]*[|] *attr\b", r"[{]%[-+ ]*(inc|im|ex|fr)"),
    "a template must not reach for names with __, the filter attr, escapes such as \\x5f, or other templates",
)
TemplateText = Annotated[
    str,
    StringConstraints(max_length=4096),
    Field(json_schema_extra=_INNER.schema()),
    AfterValidator(_INNER.check),
]
"""Jinja; what it may do is up to the sandbox that renders it."""

_DUNDER = _Forbidden(
    ("__", r"[|] *attr\b", r"\\[xuN0-9]"),
    "an expression must not reach for names with __, the filter attr, or escapes such as \\x5f",
)
ExpressionText = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2048),
    Field(json_schema_extra=_DUNDER.schema()),
    AfterValidator(_DUNDER.check),
]
"""A Jinja expression; what it may use is up to the sandbox that evaluates it."""
