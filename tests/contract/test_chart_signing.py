"""The chart hands the operator its key, as a file, and no pod of a job."""

from typing import Any

import kubernetes_validate
import pytest

from finetune_operator.settings import Settings
from support.charting import of_kind, render

GIVEN = {"signing": {"existingSecret": "our-key", "key": "a.pem"}}


def operator_pod(values: dict[str, Any]) -> dict[str, Any]:
    [deployment] = of_kind(render(values), "Deployment")
    kubernetes_validate.validate(deployment, "1.36", strict=True)
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


def test_a_key_is_a_file_that_the_settings_name() -> None:
    pod = operator_pod(GIVEN)
    [container] = pod["containers"]
    env = {entry["name"]: entry.get("value", "x") for entry in container["env"]}
    settings = Settings.from_environment(env)
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "signing"]
    assert str(settings.signing_key) == f"{mount['mountPath']}/key.pem"
    assert mount["readOnly"] is True
    [volume] = [v for v in pod["volumes"] if v["name"] == "signing"]
    assert volume["secret"]["secretName"] == "our-key"
    assert volume["secret"]["items"] == [{"key": "a.pem", "path": "key.pem"}]


@pytest.mark.parametrize("values", [{}, GIVEN])
def test_nothing_but_the_operator_has_it(values: dict[str, Any]) -> None:
    names = [v["name"] for v in operator_pod(values)["volumes"]]
    assert ("signing" in names) == bool(values)
    others = [m for m in render(values) if m["kind"] != "Deployment"]
    assert "our-key" not in str(others)
