"""The questions of the demo about the picture beside the model, and what is to be seen there."""

PICTURE = "table.png"
LISTED = "A black cube, a black can, a blue bowl and a red cube."
QUESTIONS: tuple[str, ...] = (
    "Which objects are on the table?",
    "Where is the bowl relative to the red cube?",
    "Is there a black can?",
    "Move all black things into the blue bowl.",
    "How many bowls do you see?",
    "Could you place the black can on the plate?",
)
