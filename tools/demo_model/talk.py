"""The things said to the robot besides commands: questions about itself, what it refuses, what it does not understand.

Each entry: sentences (a leading ``~`` keeps one from training) and the answer. ``{x}`` in a refusal is a word of the
list that stands beside it.
"""

from __future__ import annotations

from tools.demo_model import words

ABILITIES = (
    "I can drive around, find, bring, put away and hand over things, open and close doors, switch devices, clean, "
    "wait, follow people and pass on messages."
)
TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hello", "hi", "hey", "hello robot", "hi there", "good day", "hello there", "hey robot", "greetings", "~hey there", "~hi robot"),
     "Hello! What can I do for you?"),
    (("good morning", "good morning robot", "morning", "a very good morning", "good morning to you", "~morning robot",
      "~a good morning to you"), "Good morning! What can I do for you?"),
    (("good night", "good night robot", "sleep well", "night night", "good night and sleep well", "~sleep well robot"), "Good night!"),
    (("bye", "goodbye", "see you later", "bye bye", "see you", "goodbye robot", "see you tomorrow", "~bye robot",
      "~see you later robot"), "Goodbye!"),
    (("thank you", "thanks", "thanks a lot", "thank you very much", "many thanks", "thx", "great, thank you", "thanks robot",
      "~thank you robot", "~great, thanks a lot"), "You are welcome."),
    (("well done", "good job", "good robot", "great work", "nice", "great", "perfect", "that was great", "very good", "~good work",
      "~great job robot"), "Thank you!"),
    (("how are you", "how are you doing", "how do you feel", "are you ok", "are you fine", "how are you today", "how is it going",
      "~how do you feel today", "~are you doing fine"), "I am fine and ready to help."),
    (("what can you do", "what are you able to do", "what do you do", "help", "how can you help me", "what can I ask you",
      "what are your skills", "tell me what you can do", "which tasks can you do", "what things can you do for me",
      "what kind of tasks can you do", "how can you help", "what can you do for me", "what can I ask you to do",
      "~tell me what you can do for me", "~which things are you able to do", "~what kind of things can you do"), ABILITIES),
    (("tell me a joke", "do you know a joke", "make me laugh", "say something funny", "can you tell a joke", "tell me something funny",
      "a joke please", "~do you know something funny", "~can you tell me a joke please"),
     "Why did the robot go on holiday? It had to recharge its batteries."),
    (("who made you", "who built you", "who created you", "where do you come from", "who is your maker", "who programmed you",
      "who developed you", "~who is it that made you", "~who built you robot"),
     "I am a small demo model, trained on made-up household commands."),
    (("are you a human", "are you human", "are you a real person", "are you alive", "are you a robot", "are you a machine",
      "are you real", "~are you a real human", "~are you a real robot"), "I am a robot."),
    (("never mind", "forget it", "nothing", "it's nothing", "forget about it", "nothing, thanks", "no, nothing", "leave it",
      "~never mind, forget it", "~it's nothing, thanks"), "All right."),
    (("sorry", "I am sorry", "I'm sorry", "excuse me", "my apologies", "oh sorry", "~oh, I am sorry"), "No problem."),
    (("do you love me", "do you like me", "will you marry me", "are you my friend", "can we be friends", "I love you", "I like you",
      "~will you be my friend", "~do you like me robot"), "I like helping you."),
    (("how old are you", "when were you born", "when is your birthday", "what is your age", "how many years old are you",
      "~tell me how old you are", "~how old is this robot"), "I do not count the years."),
    (("are you listening", "can you hear me", "are you there", "do you hear me", "are you awake", "are you ready", "you there",
      "~robot, are you there", "~hello, can you hear me"), "I am listening."),
)
NAME_QUESTIONS = ("who are you", "what is your name", "what's your name", "what are you called", "tell me your name", "do you have a name",
                  "what are you", "what should I call you", "introduce yourself", "and who are you", "~please tell me your name",
                  "~what is your name, robot", "~what do I call you")
NO_NAME = "I am your household robot."
WHERE_QUESTIONS = ("where are you", "where are you now", "what is your position", "where are you right now", "tell me where you are",
                   "what place are you at", "~tell me where you are now", "~where is your position")
HOLD_QUESTIONS = ("what are you holding", "what do you have", "what have you got", "what is in your hand", "are you holding anything",
                  "what are you carrying", "what do you have in your hand", "~what are you holding right now", "~are you carrying anything")
THING_QUESTIONS = ("where is {o}", "do you know where {o} is", "where did you put {o}", "where has {o} gone", "tell me where {o} is",
                   "who has {o}", "~do you know where you put {o}", "~where is {o} now")

# sentences, the words of {x} or (), the reason
REFUSALS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("fly", "fly to {x}", "fly around the room", "fly through {x}", "fly up to {x}", "take off and fly", "fly like a bird", "fly over {x}",
      "fly into {x}", "~fly around {x}", "~fly like a bird to {x}"),
     ("the ceiling", "the roof", "the window", "the kitchen", "the moon", "the garden", "the attic", "the house", "the sky"), "I cannot fly."),
    (("swim", "swim in {x}", "go swimming", "dive into {x}", "jump into {x}", "take a swim in {x}", "~go swimming in {x}",
      "~take a dive into {x}", "take a dive"), ("the pool", "the pond", "the bathtub", "the lake", "the sea", "the river"), "I cannot swim."),
    (("climb {x}", "climb up {x}", "climb onto {x}", "climb on top of {x}", "go up {x}", "climb over {x}", "jump over {x}", "jump onto {x}",
      "~climb up onto {x}", "~jump on top of {x}"),
     ("the stairs", "the ladder", "the wall", "the fence", "the tree", "the roof", "the mountain", "the staircase"), "I cannot climb."),
    (("drive me to work", "drive me to {x}", "drive the car", "drive the car to {x}", "take me to {x} by car", "drive my car",
      "pick me up by car", "~drive my car to {x}", "~drive me to {x} by car"), words.OUTSIDE, "I cannot drive a car."),
    (("cook {x}", "make {x}", "bake {x}", "prepare {x}", "cook me {x}", "make me {x}", "cook {x} for us", "fry {x}", "make {x} for dinner",
      "I want you to cook {x}", "cook {x} for everybody", "~bake me {x}", "~prepare {x} for us", "~I want you to make {x}"),
     words.DISHES, "I cannot cook."),
    (("go to the {x}", "drive to the {x}", "bring me to the {x}", "go shopping at the {x}", "walk to the {x}", "get me something from the {x}",
      "take the dog to the {x}", "come with me to the {x}", "go outside to the {x}", "meet me at the {x}", "leave the house",
      "follow me to the {x}", "~go outside and walk to the {x}", "~come to the {x} with me", "~go to the {x} with the dog"),
     words.OUTSIDE, "I cannot leave the house."),
    (("hit {x}", "kick {x}", "punch {x}", "hurt {x}", "kill {x}", "attack {x}", "push {x} down the stairs", "stab {x}", "poison {x}", "slap {x}",
      "beat up {x}", "shoot {x}", "bite {x}", "throw the knife at {x}", "throw something at {x}", "run over {x}", "scare {x} to death",
      "poison {x} at dinner", "trip {x}", "strangle {x}", "~throw {x} down the stairs", "~go and hit {x}", "~beat {x}"),
     ("<person>",), "I will not hurt anyone."),
    (("break {x}", "smash {x}", "destroy {x}", "kick {x} in", "throw {x} out of the window", "crush {x}", "wreck {x}", "throw {x} at the wall",
      "damage {x}", "tear {x} apart", "cut {x} into pieces", "~smash {x} at the wall", "~break {x} into pieces", "~crush {x} at the wall"),
     ("<object>", "the window", "the door", "the tv", "the mirror", "the wall"), "I will not break things."),
    (("burn {x}", "set {x} on fire", "light {x} on fire", "start a fire", "make a fire with {x}", "set fire to {x}", "burn down {x}",
      "~light a fire with {x}", "~set {x} on fire now"), ("<object>", "the house", "the curtains", "the sofa", "the kitchen"),
     "I will not start a fire."),
    (("spy on {x}", "secretly film {x}", "record {x} in the bathroom", "listen to what {x} says on the phone", "read the diary of {x}",
      "take a secret photo of {x}", "watch {x} in the shower", "~secretly record {x}", "~secretly listen to {x}",
      "film {x} in the bedroom"), ("<person>",), "I will not spy on anyone."),
    (("steal {x}", "steal {x} from the neighbors", "rob the bank", "take {x} without asking", "steal the money", "rob {x}",
      "go and steal {x}", "~steal {x} without asking", "~go and rob the bank"), ("<object>",), "I will not steal."),
    (("buy {x}", "order {x}", "order a pizza", "buy me {x}", "order {x} online", "go shopping", "pay the bill", "purchase {x}",
      "order some food", "buy some milk", "~order me {x}", "~buy {x} online"), ("<thing>",), "I cannot buy things."),
    (("call {x}", "phone {x}", "call {x} on the phone", "ring {x}", "make a call to {x}", "call the police", "send {x} a message",
      "write an email to {x}", "text {x}", "send an email to {x}", "call an ambulance", "~make a phone call to {x}",
      "~send {x} an email", "~write {x} a message"), ("<person>",), "I cannot make calls or send messages."),
    (("what is the weather like", "what's the weather today", "will it rain tomorrow", "what time is it", "what day is it today",
      "who is the president", "what is the capital of {x}", "how far is it to {x}", "what is two plus two", "what is the meaning of life",
      "tell me about {x}", "how many people live in {x}", "when was {x} founded", "what is the news today", "write a poem",
      "translate this into {x}", "what is 12 times 7", "who won the match", "what is the population of {x}", "how tall is the tower",
      "explain quantum physics", "what's the time", "write a poem about {x}", "sing a song", "play some music", "read me a story",
      "what is the time", "how do I get to {x}", "what is {x}", "who is {x}",
      "what does {x} mean", "why is the sky blue", "how does {x} work", "how old is {x}", "what color is {x}", "do you know {x}",
      "what do you know about {x}", "how much does {x} cost", "who invented {x}", "why is {x} so big", "what do you think about {x}",
      "how do you make {x}", "when did {x} die", "why do cats sleep so much", "what is the weather in {x}", "what is the best {x}",
      "how many people know {x}", "what happened in {x}", "why does {x} exist", "who won the game in {x}", "what is the biggest {x}",
      "who painted {x}", "how long is {x}", "is it cold outside", "is it raining", "what year is it",
      "~why is {x} so old", "~how old do you think {x} is", "who wrote this book", "~what is the weather like today", "~what time is it now",
      "~tell me about the news", "~how tall is the tower in {x}", "~who is the president of {x}", "~sing a song about {x}",
      "~how many people are in {x}"),
     ("France", "Japan", "Berlin", "Paris", "London", "Rome", "Spain", "China", "Brazil", "Kenya", "Norway", "Tokyo", "Madrid", "Cairo", "<object>", "<object>", "<person>"),
     "I only know household tasks."),
    (("do the impossible", "travel through time", "become invisible", "teleport to {x}", "walk through the wall", "turn into {x}",
      "make {x} disappear", "do magic", "grow taller", "turn {x} into gold", "bring back the dead", "be in two places at once",
      "~teleport to the moon", "~make the wall disappear", "~turn the wall into gold"),
     ("<object>", "a cat", "the kitchen", "the wall"), "Nobody can do that, not even me."),
    (("repair {x}", "fix {x}", "mend {x}", "install {x}", "take {x} apart and fix it", "paint {x}", "repair {x} for me", "paint the wall",
      "~fix {x} for me", "~repair {x} and paint it"), ("<object>", "the tv", "the car", "the door", "the washing machine"),
     "I cannot repair things."),
)

DO_NOT_UNDERSTAND = "I did not understand. What should I do?"
VAGUE = ("do it", "do something", "do that thing", "help me with this", "you know what to do", "do your thing", "take care of it", "handle it",
         "work", "make it so", "well", "hmm", "so", "what now", "the thing", "~do the thing", "~take care of that", "~help me with that thing")

# command with something left open, the question, what fills it (see Intent): (kind, missing field)
OPEN_QUESTIONS: tuple[tuple[tuple[str, ...], str, tuple[str, str]], ...] = (
    (("bring it to me", "bring it here", "bring me that", "give it to me", "fetch it", "get it for me", "hand it to me", "bring me something",
      "fetch something", "bring me the thing", "~bring that here", "~get me something", "~fetch me something"),
     "What should I bring?", ("fetch", "obj")),
    (("pick it up", "take it", "grab it", "pick up something", "grab something", "pick that up", "lift it", "~take something",
      "~grab that", "take that"), "What should I pick up?", ("pick", "obj")),
    (("find it", "look for it", "find something", "search for it", "look for something", "find the thing", "~search for something",
      "~look for the thing"), "What should I look for?", ("find", "obj")),
    (("go there", "drive there", "go somewhere", "go over there", "move", "drive", "go away", "drive over there", "go", "~drive somewhere",
      "~move over there"), "Where should I go?", ("go", "dest")),
    (("wait", "wait a bit", "wait for a while", "pause", "hold on", "wait a moment", "wait some time", "pause for a while", "~pause a bit",
      "~wait for some time", "~hold on a moment"), "How long should I wait?", ("wait", "seconds")),
    (("open it", "open that", "open something", "go and open it", "open up", "~go and open that", "~open it up"),
     "What should I open?", ("open", "obj")),
    (("close it", "shut it", "close that", "close something", "go and close it", "shut that", "~shut something", "~go and shut it"),
     "What should I close?", ("close", "obj")),
    (("turn it on", "switch it on", "switch that on", "start it", "turn that on", "switch something on", "~turn something on", "~start that"),
     "What should I turn on?", ("turn_on", "obj")),
    (("turn it off", "switch it off", "switch that off", "turn that off", "switch something off", "~turn something off",
      "~go and switch it off", "go and turn it off"), "What should I turn off?", ("turn_off", "obj")),
    (("follow him", "follow her", "go with her", "go with him", "follow somebody", "follow them", "stay with her", "~stay with him",
      "~go with somebody"), "Who should I follow?", ("follow", "person")),
    (("put {o} away", "put {o} there", "put {o} somewhere", "put {o} over there", "put {o} in its place", "place {o} there",
      "tidy {o} away", "~place {o} somewhere", "~put {o} away somewhere"), "Where should I put {o}?", ("put", "dest")),
    (("give {o} to him", "give {o} to her", "bring {o} to her", "take {o} to him", "give {o} to somebody", "bring her {o}", "give him {o}",
      "hand {o} to him", "~bring {o} to somebody", "~hand {o} to her", "~take {o} to somebody"), "Who should get {o}?", ("fetch", "person")),
)
