"""The zoos on whose pools the advice is calibrated, by name."""

from pluribus.inspect.calibrate import Bed

HARDER = (
    ("classes", "all"), ("normalise", False), ("depth", 4), ("base_steps", 150),
    ("base_pool", 300),
)  # fmt: skip

BEDS = {
    bed.name: bed
    for bed in (
        Bed(name="vision6", zoo="vision6"),
        Bed(name="vision6-harder", zoo="vision6", settings=HARDER),
        Bed(name="vision8", zoo="vision8", sizes=(2, 3, 4, 5, 6, 8), limit=100),
        Bed(
            name="vision8-pretrained",
            zoo="vision8_pretrained",
            settings=(("test", 250), ("threads", 1)),
            sizes=(2, 3, 4, 6),
            limit=60,
        ),
        Bed(name="text6", zoo="text6", sizes=(2, 3, 5), limit=48),
    )
}
