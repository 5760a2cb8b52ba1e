"""A short text of lorakit's own, for checking a file when no rows are given."""

from lorakit.models.chat_template import Messages

TEXTS = [
    "The baker on our street opens at six. By then the first loaves have cooled, and the smell has "
    "reached the bus stop, where people wait with their collars up. She sells the broken ones for "
    "half the price, and those are always gone before the whole ones.",
    "To find the middle of a sorted list, look at how many items it has. If the number is odd, one "
    "item stands in the middle. If it is even, two do, and their mean is taken:\n\n"
    "def median(values):\n    values = sorted(values)\n    half = len(values) // 2\n"
    "    if len(values) % 2:\n        return values[half]\n"
    "    return (values[half - 1] + values[half]) / 2\n",
    "Water expands when it freezes. That is why ice floats, why pipes burst in winter, and why a "
    "lake freezes from the top down. Below the ice the water stays at about 4 degrees Celsius, and "
    "the fish live through the cold months there.",
    "Question: A train leaves at 14:35 and arrives at 17:10. How long does it take?\n"
    "Answer: From 14:35 to 17:35 there are three hours. The train arrives 25 minutes before that, "
    "so it takes 2 hours and 35 minutes.",
    "Dear Mr. Okafor,\n\nthank you for your letter of 3 May. The part that you ask about is no "
    "longer made, but the one with the number 40-218 fits the same machines, and costs $12.50. "
    "Shall we send you two of them?\n\nYours sincerely,\nHelen Marsh",
    "Am Morgen lag Nebel über dem Fluss. Die Fähre fuhr trotzdem, langsam und mit lautem Horn. "
    "El barco llegó al otro lado a las ocho, y nadie tuvo prisa. 川の向こうには小さな町がある。",
]
"""English, code, numbers, other languages."""

CHAT: Messages = [
    {"role": "user", "content": "Which is larger, 7/8 or 0.9?"},
    {"role": "assistant", "content": "0.9 is larger: 7/8 is 0.875."},
    {"role": "user", "content": "And 8/9?\nGive a decimal too."},
]
"""A chat of three turns."""
