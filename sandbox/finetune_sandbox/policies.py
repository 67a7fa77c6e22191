"""ValidatingAdmissionPolicy: CEL over the object, the request, parameters and what the author may do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import cel

from finetune_sandbox.auth import Attributes, Authorizer, User
from finetune_sandbox.cel import CORE, FUNCTIONS
from finetune_sandbox.errors import ApiError, Cause, Obj, bad_request, forbidden, not_supported, required, wrong
from finetune_sandbox.gate import Asked, check_match, configurations, meant, placed, selected
from finetune_sandbox.resources import Kinds, Resource
from finetune_sandbox.selectors import from_label_selector
from finetune_sandbox.store import Filter, Store

_ERRORS = (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError)
_ACTIONS = ("Deny", "Warn")
_POLICY_FAILURES = ("Fail", "Ignore")
_MEMBERS = ("group", "resource", "subresource", "namespace", "name")
_VARIABLES = ("object", "oldObject", "request", "namespaceObject", "params", "authorizer", "variables")
_BOUND = re.compile(r"\.(?:all|exists|exists_one|map|filter)\(\s*(\w+)\s*,")
_CODES = {"Unauthorized": 401, "Forbidden": 403, "Invalid": 422, "RequestEntityTooLarge": 413}


@lru_cache(maxsize=1024)
def _program(text: str) -> cel.Program:
    return cel.compile(text)


def validate(policy: Obj, old: Obj | None) -> list[Cause]:
    """A policy whose expressions this server cannot run is refused."""
    spec = policy.get("spec") or {}
    found = check_match(spec.get("matchConstraints") or {}, "spec.matchConstraints")
    if spec.get("failurePolicy", "Fail") not in _POLICY_FAILURES:
        found.append(not_supported("spec.failurePolicy", spec["failurePolicy"], _POLICY_FAILURES))
    if not spec.get("validations"):
        found.append(required("spec.validations", "the sandbox has no audit annotations"))
    for i, entry in enumerate(spec.get("validations") or ()):
        if entry.get("reason", "Invalid") not in _CODES:
            found.append(not_supported(f"spec.validations[{i}].reason", entry["reason"], tuple(_CODES)))
    for part, key in _EXPRESSIONS:
        for i, entry in enumerate(spec.get(part) or ()):
            if text := entry.get(key):
                found += _unusable(text, f"spec.{part}[{i}].{key}")
    return found


def _unusable(text: str, path: str) -> list[Cause]:
    """Why an expression cannot be run here: a function or a variable that this server does not have is an error when
    the policy is stored, not when somebody writes an object."""
    try:
        program = _program(text)
    except ValueError as error:
        return [wrong(path, text, f"compilation failed: {error}")]
    known = {*CORE, *FUNCTIONS, *_MEMBERS, "check", "allowed", *_VARIABLES, *_BOUND.findall(text)}
    named = [f for f in program.functions() if f.isidentifier()] + list(program.variables())
    unknown = sorted(set(named) - known)
    return [wrong(path, text, f"compilation failed: undeclared reference to {', '.join(unknown)}")] if unknown else []


_EXPRESSIONS = (
    ("matchConditions", "expression"),
    ("variables", "expression"),
    ("validations", "expression"),
    ("validations", "messageExpression"),
)


def validate_binding(binding: Obj, old: Obj | None) -> list[Cause]:
    spec = binding.get("spec") or {}
    actions = spec.get("validationActions") or [""]
    found = [not_supported("spec.validationActions", a, _ACTIONS) for a in actions if a not in _ACTIONS]
    return found + check_match(spec.get("matchResources") or {}, "spec.matchResources")


class Policies:
    def __init__(self, store: Store, kinds: Kinds, authorizer: Authorizer) -> None:
        self._store, self._kinds, self._authorizer = store, kinds, authorizer

    def concern(self, asked: Asked) -> bool:
        """Whether there may be a policy to ask; cheaper than the object that it would be asked about."""
        found = configurations(self._store, "validatingadmissionpolicies")
        matches = (policy["spec"].get("matchConstraints") or {} for policy in found)
        return any(meant(m.get("resourceRules") or (), asked) and placed(m, asked, self._store) for m in matches)

    def check(self, asked: Asked) -> list[str]:
        """Warnings. Raises ApiError where a policy denies the write."""
        warnings: list[str] = []
        policies = {p["metadata"]["name"]: p for p in configurations(self._store, "validatingadmissionpolicies")}
        for binding in configurations(self._store, "validatingadmissionpolicybindings"):
            policy = policies.get(binding["spec"].get("policyName"))
            if policy is None or not self._meant(policy, asked) or not self._bound(binding, asked):
                continue
            for params in self._params(policy, binding):
                for reason, message in self._findings(policy["spec"], asked, params):
                    names = f"'{policy['metadata']['name']}' with binding '{binding['metadata']['name']}'"
                    text = f"ValidatingAdmissionPolicy {names} denied request: {message}"
                    if "Deny" in binding["spec"]["validationActions"]:
                        key = asked.resource.key
                        raise ApiError(_CODES[reason], reason, forbidden(key, asked.name, text).message)
                    warnings.append(f"Validation failed for {text}")
        return warnings

    def check_deletion(
        self, user: User, resource: Resource, old: Obj, options: Obj | None = None, *, dry_run: bool = False
    ) -> list[str]:
        """As `check`, of an object that somebody wants to delete."""
        asked = Asked(user, "DELETE", resource, "", None, old, dry_run, options)
        return self.check(asked) if self.concern(asked) else []

    def _meant(self, policy: Obj, asked: Asked) -> bool:
        match = policy["spec"].get("matchConstraints") or {}
        return meant(match.get("resourceRules") or (), asked) and selected(match, asked, self._store)

    def _bound(self, binding: Obj, asked: Asked) -> bool:
        match = binding["spec"].get("matchResources") or {}
        rules = match.get("resourceRules")
        return (not rules or meant(rules, asked)) and selected(match, asked, self._store)

    def _params(self, policy: Obj, binding: Obj) -> Sequence[Obj | None]:
        """The parameter objects; a single None where the policy takes none."""
        kind = policy["spec"].get("paramKind")
        if not kind:
            return [None]
        (resource,) = (r for r in self._kinds.all() if (r.api_version, r.kind) == (kind["apiVersion"], kind["kind"]))
        ref: Obj = binding["spec"].get("paramRef") or {}
        wanted = Filter(str(ref.get("namespace", "")))
        found = [entry.obj for entry in self._store.tables[resource.key].select(wanted)]
        if ref.get("name"):
            found = [obj for obj in found if obj["metadata"]["name"] == ref["name"]]
        else:
            selector = from_label_selector(ref.get("selector") or {})
            found = [obj for obj in found if selector.matches(obj["metadata"].get("labels") or {})]
        if not found and ref.get("parameterNotFoundAction", "Deny") == "Deny":
            raise bad_request("no params found for policy binding with `Deny` parameterNotFoundAction")
        return found

    def _findings(self, spec: Obj, asked: Asked, params: Obj | None) -> Iterator[tuple[str, str]]:
        """Reason and message of each validation that does not hold."""
        context = self._context(asked, params)
        ignore = spec.get("failurePolicy", "Fail") == "Ignore"
        try:
            if not all(_run(c["expression"], *context) for c in spec.get("matchConditions") or ()):
                return
        except _ERRORS as error:
            if not ignore:
                yield "Invalid", f"match condition resulted in error: {error}"
            return
        variables: Obj = context[0]["variables"]
        for variable in spec.get("variables") or ():
            try:
                variables[variable["name"]] = _run(variable["expression"], *context)
            except _ERRORS:
                continue  # it is an error where it is used
        for validation in spec["validations"]:
            text = validation["expression"]
            try:
                held = _run(text, *context)
            except _ERRORS as error:
                why = f"no such key: {error.args[0]}" if isinstance(error, KeyError) else str(error)
                if not ignore:
                    yield "Invalid", f"expression '{text}' resulted in error: {why}"
                continue
            if held is not True:
                yield validation.get("reason", "Invalid"), _message(validation, context)

    def _context(self, asked: Asked, params: Obj | None) -> tuple[Obj, dict[str, Callable[..., Any]]]:
        variables = {
            "object": asked.new,
            "oldObject": asked.old,
            "request": asked.request(""),
            "namespaceObject": self._namespace(asked),
            "params": params,
            "authorizer": {},
            "variables": {},
        }
        return variables, dict(FUNCTIONS) | _authorizer(self._authorizer, asked.user)

    def _namespace(self, asked: Asked) -> Obj | None:
        entry = self._store.get("namespaces", "", asked.namespace) if asked.namespace else None
        return entry.obj if entry else None


def _run(text: str, variables: Mapping[str, Any], functions: dict[str, Callable[..., Any]]) -> Any:
    return _program(text).execute(cel.Context(dict(variables), functions))


def _message(validation: Mapping[str, Any], context: tuple[Obj, dict[str, Callable[..., Any]]]) -> str:
    plain = str(validation.get("message") or f"failed expression: {validation['expression']}")
    if not validation.get("messageExpression"):
        return plain
    try:
        return str(_run(validation["messageExpression"], *context))
    except _ERRORS:
        return plain


def _authorizer(authorizer: Authorizer, user: User) -> dict[str, Callable[..., Any]]:
    """The methods of `authorizer`: each adds to the question, `allowed` asks it."""

    def add(key: str) -> Callable[[Obj, str], Obj]:
        return lambda question, value: question | {key: value}

    functions: dict[str, Callable[..., Any]] = {key: add(key) for key in _MEMBERS}
    return functions | {
        "check": add("verb"),
        "allowed": lambda question: authorizer.allows(user, Attributes(**question)),
    }
