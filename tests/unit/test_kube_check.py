"""The matrix that `blastdoor cluster check` prints, from what was found."""

from workers.kube.check import MADE_OF, Line, Row, State, matrix
from workers.kube.install import Choices, wanted

PRESENT, DIFFERS, MISSING = State.PRESENT, State.DIFFERS, State.MISSING
ENFORCED, INERT, UNTRIED = State.ENFORCED, State.INERT, State.UNTRIED


def test_what_was_tried_stands_beside_what_it_is_made_of() -> None:
    rows = [
        Row("PriorityClass blastdoor-low", PRESENT),
        Row("FlowSchema blastdoor-engine", MISSING),
        Row("PriorityLevelConfiguration blastdoor-engine", DIFFERS, "spec.type"),
        Row("RuntimeClass kata-fc", PRESENT),
        Row("priority", ENFORCED, "a sandbox's pod has -10"),
        Row("flow control", INERT, "counted under another"),
        Row("PodSecurity", ENFORCED, "refused"),
        Row("sandboxes", UNTRIED, "doctor tries them"),
    ]
    assert matrix(rows) == [
        Line("priority", PRESENT, ENFORCED, "a sandbox's pod has -10"),
        Line(
            "flow control", MISSING, INERT,
            "FlowSchema blastdoor-engine missing; "
            "PriorityLevelConfiguration blastdoor-engine differs spec.type; counted under another",
        ),
        Line("PodSecurity", None, ENFORCED, "refused"),
        Line("sandboxes", None, UNTRIED, "doctor tries them"),
        Line("RuntimeClass kata-fc", PRESENT, None, ""),
    ]  # fmt: skip


def test_every_manifest_is_in_the_matrix_once_tried_or_not() -> None:
    """What a defence is said to be made of is what `install` applies: a name that is wrong would hide nothing, and say
    nothing."""
    installed = [f"{one['kind']} {one['metadata']['name']}" for one in wanted(Choices(image_prefix="x/"))]
    made_of = {name for names in MADE_OF.values() for name in names}
    assert made_of <= set(installed)
    policies = {name for name in installed if name.startswith("ValidatingAdmissionPolicy")}
    assert policies <= made_of, "a policy that nothing tries"
    rows = [Row(name, PRESENT) for name in installed]
    assert [line.defence for line in matrix(rows)] == installed
    tried = [Row(defence, ENFORCED) for defence in MADE_OF]
    assert {line.defence for line in matrix([*rows, *tried])} == MADE_OF.keys() | (set(installed) - made_of)
