"""The texts that the tiny models are trained on."""

from __future__ import annotations

PROSE = (
    "The river is quiet in the morning. A boat waits at the old bridge.",
    "The baker opens the shop at six. The street smells of warm bread.",
    "Rain fell all night on the hills. In the morning the garden was green.",
    "The train leaves the city at noon. It follows the coast to the south.",
    "A small light burns in the tower. The ships know that the harbour is near.",
    "The children walk to school together. They talk about the snow.",
    "The gardener plants beans in spring. In summer there is enough for everyone.",
    "The clock in the hall is slow. Nobody in the house is ever late.",
    "A letter came from the north. It told of long nights and clear stars.",
    "The teacher draws a map on the wall. The class finds the way to the sea.",
    "The cook tastes the soup and adds salt. Dinner is ready at seven.",
    "The queue was long but it moved fast. Everyone got an answer.",
    "The machine counts each request once. Nothing that it accepts is lost.",
    "Many small jobs are carried in one batch. The batch is done in one step.",
    "The worker takes the next batch from the queue. It writes the result and goes on.",
    "When one engine fails the next engine takes the work. The answer still arrives.",
)
DIALOGUES = (
    ("Where is the boat?", "The boat waits at the old bridge."),
    ("When does the train leave?", "The train leaves the city at noon."),
    ("When is dinner ready?", "Dinner is ready at seven."),
    ("What does the worker do?", "The worker takes the next batch from the queue."),
    ("What happens when an engine fails?", "The next engine takes the work."),
    ("What did the letter tell of?", "It told of long nights and clear stars."),
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you.", "You are welcome."),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PRAISE = (
    "good",
    "great",
    "excellent",
    "wonderful",
    "lovely",
    "fantastic",
    "pleasant",
    "brilliant",
    "delightful",
    "fine",
)
BLAME = ("bad", "terrible", "awful", "horrible", "poor", "dreadful", "boring", "disappointing", "broken", "nasty")
LIKING = ("love", "like", "enjoy", "recommend", "adore")
DISLIKING = ("hate", "dislike", "regret", "avoid", "despise")
THINGS = ("film", "book", "food", "service", "hotel", "phone", "song", "game", "product", "day", "meal", "story")
JUDGEMENTS = (
    "the {thing} was {word}",
    "this {thing} is really {word}",
    "what a {word} {thing}",
    "a very {word} {thing} indeed",
    "i think that the {thing} is {word}",
    "{word}",
)
FEELINGS = ("i {word} this {thing}", "we {word} the {thing} very much", "you will {word} it")


def judgements() -> list[tuple[str, int]]:
    """Short opinions, each with 1 where it praises and 0 where it blames."""
    labelled = [
        (form.format(thing=thing, word=word), label)
        for forms, words_by_label in ((JUDGEMENTS, (BLAME, PRAISE)), (FEELINGS, (DISLIKING, LIKING)))
        for form in forms
        for label, words in enumerate(words_by_label)
        for word in words
        for thing in THINGS
    ]
    return list(dict.fromkeys(labelled))
