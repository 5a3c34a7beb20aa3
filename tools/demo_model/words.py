"""The words of the grammar: things, places, people, made-up words, and which of them training never sees.

Closed classes carry knowledge the model must have (a fridge has a door, a piano is heavy) and are all seen in
training. Open classes are only copied into the plan; a part of each is kept from training (``reserved``), and made-up
words join them, so that copying is what is learned rather than the list.
"""

from __future__ import annotations

import functools
import hashlib
from random import Random

RESERVED_SHARE = 12  # one word of an open class in 12 is kept from training


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in " ".join(text.split()).split(",") if word.strip())


OBJECTS = _split("""cup, mug, glass, plate, bowl, fork, spoon, knife, pan, pot, lid, bottle, jar, can, kettle, teapot,
    tray, napkin, towel, sponge, cloth, brush, broom, mop, bucket, apple, banana, orange, lemon, pear, tomato, potato,
    carrot, onion, bread, butter, cheese, milk, juice, water bottle, glass of water, cup of tea, cup of coffee, yogurt,
    egg carton, sandwich, salad, pizza box, cereal box, chocolate, cookie jar, sugar, salt shaker, pepper mill, honey,
    jam, oil, vinegar, rice, pasta, flour, soup bowl, cake, muffin, ice cream, book, newspaper, magazine, letter,
    notebook, pen, pencil, ruler, scissors, stapler, tape, envelope, folder, phone, tablet, laptop, charger, cable,
    headphones, remote, remote control, camera, watch, wallet, purse, backpack, suitcase, handbag, umbrella, hat, cap,
    scarf, gloves, jacket, coat, sweater, shirt, t-shirt, jeans, socks, shoes, slippers, boots, belt, tie, pajamas,
    blanket, pillow, cushion, sheet, teddy bear, doll, ball, puzzle, toy car, toy train, building blocks, board game,
    deck of cards, guitar tuner, harmonica, candle, matches, flashlight, battery, screwdriver, hammer, wrench, pliers,
    screws, nails, drill, tape measure, paint brush, glue, rope, watering can, flower pot, vase, picture frame, clock,
    alarm clock, mirror, comb, hairbrush, toothbrush, toothpaste, soap, shampoo, razor, tissue box, toilet paper, pills,
    medicine, bandage, first aid kit, thermometer, glasses, sunglasses, keys, car keys, house key, passport, ticket,
    map, calendar, dog leash, dog food, cat food, bird seed, baby bottle, pacifier, diaper, storybook, crayons,
    coloring book, lunch box, thermos, straw, chopsticks, cutting board, peeler, whisk, ladle, spatula, grater,
    measuring cup, oven mitt, apron, corkscrew, bottle opener, can opener, paper towels, trash bag, dustpan, iron,
    clothespins, coat hanger, sewing kit, thread, needle case, button box, yarn, knitting basket, magnifying glass,
    hearing aid, walking stick, hot water bottle, heating pad, photo album, postcard, stamp, gift, parcel, package,
    box of chocolates, bag of chips, bag of apples, pack of gum, stack of plates, pair of socks, bottle of wine,
    bottle of water, can of soda, jar of pickles, box of tissues, carton of milk, loaf of bread, piece of cake,
    bunch of grapes, bar of soap, roll of tape, pile of books, basket of laundry""")
PLURALS = frozenset(_split("""scissors, headphones, gloves, jeans, socks, shoes, slippers, boots, pajamas, matches,
    screws, nails, pliers, building blocks, pills, glasses, sunglasses, keys, car keys, crayons, chopsticks,
    paper towels, clothespins"""))
ADJECTIVES = _split("""red, blue, green, yellow, black, white, brown, pink, purple, orange, grey, silver, golden,
    small, big, large, little, old, new, clean, dirty, empty, full, wooden, plastic, metal, glass, striped, round, broken,
    heavy, light, soft, warm, cold, favorite, other, spare""")
COLOURS = _split("red, blue, green, yellow, black, white, brown, pink, purple, orange, grey, silver")

ROOMS = _split("""kitchen, living room, bedroom, bathroom, hallway, hall, office, study, garage, basement, attic, pantry,
    laundry room, dining room, guest room, playroom, nursery, library, workshop, balcony, terrace, porch, garden, entrance,
    corridor, lounge, den, cellar, kids room, master bedroom, guest bathroom, sunroom, music room, storage room, studio""")
SURFACES = _split("""table, kitchen table, dining table, coffee table, desk, shelf, top shelf, bookshelf, counter,
    kitchen counter, nightstand, bedside table, windowsill, sofa, couch, armchair, chair, bench, stool, bed, rug, floor,
    doormat, workbench, mantelpiece, side table, sideboard, tv stand, carpet, ottoman, piano bench, rack, shoe rack,
    cutting board, tray, stove, mat, ledge, cart, tea trolley""")
CONTAINERS = _split("""sink, basket, laundry basket, bin, trash can, recycling bin, box, toy box, crate, bathtub, bag,
    fruit bowl, bowl, bucket, tub, vase, umbrella stand, shopping bag, tool box, dog bed, pen holder, mailbox""")
CLOSED = _split("""fridge, refrigerator, freezer, cupboard, cabinet, kitchen cabinet, medicine cabinet, drawer,
    top drawer, bottom drawer, kitchen drawer, desk drawer, wardrobe, closet, dishwasher, washing machine, dryer,
    microwave, oven, safe, chest, dresser""")
OPENABLE = _split("""door, front door, back door, window, kitchen window, bedroom window, gate, curtains, blinds, garage door,
    bathroom door, balcony door, shutters, skylight, cat flap, pantry door""") + CLOSED
DEVICES = _split("""lamp, light, ceiling light, desk lamp, floor lamp, night light, tv, television, radio, stereo, fan,
    heater, air conditioner, coffee machine, coffee maker, toaster, dishwasher, washing machine, dryer, oven, stove,
    microwave, vacuum cleaner, computer, printer, speaker, humidifier, air purifier, kettle, christmas lights,
    hair dryer, sprinkler, fireplace, electric blanket, projector, game console""")
CLEANABLE = _split("""table, kitchen table, desk, counter, kitchen counter, floor, window, sink, stove, shelf, mirror, bathtub,
    carpet, rug, sofa, oven, fridge, shower, toilet, mess, spill, stain, coffee table, windowsill, bookshelf, stairs""")
CLOSABLE_STATES, DEVICE_STATES = ("open", "closed"), ("on", "off")

HEAVY = _split("""car, piano, sofa, couch, fridge, refrigerator, washing machine, wardrobe, bed, bathtub, dining table,
    stove, oven, house, truck, motorcycle, dishwasher, bookshelf, freezer, grand piano, tree, boat, safe, tractor, elephant""")
LIVING = _split("cat, dog, baby, puppy, kitten, hamster, rabbit, parrot, goldfish, child, toddler, guinea pig, turtle")
HURTING = _split("microwave, oven, washing machine, dryer, freezer, dishwasher, fridge, trash can, toilet, fireplace")
OUTSIDE = _split("""supermarket, moon, airport, beach, school, park, city, cinema, train station, bank, post office, mall, gym,
    hospital, zoo, forest, bus stop, gas station, restaurant, neighbors, pharmacy, bakery, stadium, museum, library downtown""")
DISHES = _split("""lasagna, dinner, breakfast, lunch, soup, a cake, pancakes, spaghetti, an omelette, a steak, some rice,
    some eggs, a pizza, a pie, curry, a stew, cookies, a roast, some noodles, risotto, a sandwich, fried potatoes""")

FEMALE = _split("""Anna, Maria, Emma, Sophie, Laura, Julia, Clara, Lisa, Nina, Eva, Mia, Olivia, Grace, Alice, Sarah, Helen,
    Ruth, Ingrid, Yuki, Aisha, Fatima, Priya, Mei, Chloé, Zoë, Renée, Søs, Łucja, Begoña, Anaïs, Jana, Petra, Carmen,
    Rosa, Lucía, Amélie, Katja, Hannah, Leila, Noor, Sakura, Ngozi, Amina, Vera, Dora, Edith, Mrs Miller, Aunt Rosa""")
MALE = _split("""Tom, Max, Paul, Peter, David, Daniel, Lukas, Jonas, Felix, Oscar, Henry, Jack, James, Robert, Martin, Carlos,
    Diego, José, André, François, Jürgen, Björn, Søren, Mikołaj, Hiroshi, Kenji, Wei, Ahmed, Omar, Ravi, Arjun, Kwame,
    Ivan, Dmitri, Georg, Karl, Ben, Leo, Noah, Emil, Hugo, Luca, Marco, Nils, Sven, Walter, Mr Smith, Uncle Bob""")
FEMALE_KIN = _split("mom, mother, grandma, grandmother, sister, aunt, daughter, wife")
MALE_KIN = _split("dad, father, grandpa, grandfather, brother, uncle, son, husband")
ROLES = _split("nurse, guest, visitor, doctor, neighbor, cleaner, gardener, babysitter, boss, plumber")
ROBOT_NAMES = _split("Robbie, Rosie, Tiago, Pepper, Nano, Bolt, Jarvis, Ada, Marvin, Gizmo, Spot, Fetchy, Otto, Chip, Luna")

_ONSETS = _split("b, bl, br, ch, d, dr, f, fl, g, gl, gr, h, j, k, kr, l, m, n, p, pl, qu, r, s, sk, sl, sn, st, t, th, tr, v, w, z")
_VOWELS = _split("a, e, i, o, u, ai, ee, oo, ou, y")
_CODAS = ("", "", "", "b", "ck", "d", "ft", "g", "l", "ll", "m", "mp", "n", "nd", "ng", "p", "r", "rk", "s", "sh", "t", "x", "zz")
_FOREIGN = _split("é, ü, ö, ä, ñ, ç, ø, å, š, ł, î, ő, ğ, я, д, ж, λ, ω, あ, 日, 木, 한, ش")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@functools.lru_cache(maxsize=1 << 16)
def reserved(word: str) -> bool:
    """True if training never uses this open-class word (upper and lower case are the same word)."""
    return _digest("word:" + word.lower()) % RESERVED_SHARE == 0


def made_up(rng: Random, *, held_out: bool) -> str:
    """A made-up word of one to three syllables, now and then with a letter from elsewhere."""
    while True:
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 2, 3)))
        )
        if rng.random() < 0.06:
            position = rng.randrange(len(word))
            word = word[:position] + rng.choice(_FOREIGN) + word[position:]
        if len(word) >= 4 and reserved(word) == held_out:
            return word


def pick(rng: Random, words: tuple[str, ...], *, held_out: bool = False) -> str:
    """One of ``words``; of the reserved ones if ``held_out``, else of the others."""
    return rng.choice(_part(words, held_out))


@functools.lru_cache(maxsize=64)
def _part(words: tuple[str, ...], held_out: bool) -> tuple[str, ...]:
    return tuple(word for word in words if reserved(word) == held_out)
