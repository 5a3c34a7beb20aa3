"""The wordings of commands. A template that starts with ``~`` is kept from training, one with ``>`` is a whole
sentence that cannot be joined to others. Each word of a held-out template also occurs in training.

Slots: {o} object, {s} where it is ("on the table"), {f} where from ("from the kitchen"), {d} where to ("in the
fridge"), {l} place, {w} in which room (" in the hall" or nothing), {p} person, {t} text, {n} duration, {v} open or
closed or on or off.
"""

from __future__ import annotations

CLAUSES: dict[str, tuple[str, ...]] = {
    "go": (
        "go to {l}", "drive to {l}", "move to {l}", "head to {l}", "head over to {l}", "go over to {l}", "come to {l}",
        "make your way to {l}", "navigate to {l}", "roll over to {l}", "walk to {l}", "return to {l}", "visit {l}",
        "go back to {l}", "go into {l}", "get to {l}", "proceed to {l}", "travel to {l}", "run to {l}",
        "drive yourself to {l}", "take yourself to {l}", ">I need you in {l}", ">I want you at {l}", ">I need you at {l}",
        ">your place is at {l}", ">meet me at {l}", ">it is time to go to {l}", "~move over to {l}", "~drive back to {l}",
        "~make your way over to {l}", "~>I want you to be at {l}", "~get yourself to {l}",
    ),
    "go.there": ("go there", "drive there", "go over there", "head there", "move there", "go back there", "~drive over there"),
    "go.p": (
        "go to {p}", "drive to {p}", "come to {p}", "go see {p}", "visit {p}", "head over to {p}", "go and find {p}",
        "move to {p}", "go over to {p}", ">{p} needs you", ">{p} is waiting for you", ">{p} wants to see you",
        "~drive over to {p}", "~go and see {p}",
    ),
    "go.me": (
        "come here", "come to me", "come over here", "come back", "come back to me", "return to me", "come over", "drive to me",
        ">I need you here", ">where are you? come here", "get over here", "~come back here", "~come over to me",
    ),
    "find": (
        "find {o}", "look for {o}", "search for {o}", "locate {o}", "go find {o}", "go look for {o}", "try to find {o}",
        "help me find {o}", "see if you can find {o}", "hunt for {o}", ">I lost {o}, look for it", ">I can't find {o}",
        ">have you seen {o}", ">I am looking for {o}", ">I wonder where {o} is", "~try to locate {o}", "~help me look for {o}",
        "~go and search for {o}", "~>I am looking to find {o}",
    ),
    "find.s": (
        "find {o} {s}", "look for {o} {s}", "search for {o} {s}", "look {s} for {o}", "search {s} for {o}",
        "go and look for {o} {s}", "see if {o} is {s}", ">I think {o} is {s}, find it", ">{o} should be {s}, look for it",
        "locate {o} {s}", "~try to find {o} {s}", "~go look {s} for {o}", "~>I think {o} is {s}, look for it",
    ),
    "pick": (
        "pick up {o}", "pick {o} up", "take {o}", "grab {o}", "lift {o}", "collect {o}", "pick {o}", "get hold of {o}",
        "grasp {o}", "hold {o}", "take hold of {o}", "lift up {o}", "~go and grab {o}", "~lift {o} up", "~go and take {o}",
    ),
    "pick.s": (
        "pick up {o} {s}", "take {o} {f}", "grab {o} {f}", "collect {o} {f}", "take {o} {s}", "pick {o} up {f}",
        "lift {o} {f}", "remove {o} {f}", "get hold of {o} {s}", "~grab {o} {s}", "~pick {o} {f}", "~{f}, take {o}",
        "{f}, pick up {o}", "{f} grab {o}",
    ),
    "fetch": (
        "bring me {o}", "fetch {o}", "fetch me {o}", "get {o}", "get me {o}", "bring {o}", "bring {o} to me", "bring {o} here", "hand me {o}",
        "give me {o}", "pass me {o}", "bring {o} over here", "deliver {o} to me", "bring {o} over", "grab {o} for me",
        "pick up {o} and bring it to me", "go get {o}", "go and get {o} for me", "fetch {o} for me", "take {o} to me",
        ">I need {o}", ">I want {o}", ">I'd like {o}", ">I would like to have {o}", ">I could use {o}", ">may I have {o}",
        ">can I have {o}", ">I want you to bring me {o}", ">could I get {o}", ">I really need {o} now", ">where is {o}? bring it to me",
        ">would you hand me {o}", "~fetch {o} here", "~go and fetch me {o}", "~get {o} for me", "~give {o} to me",
        "~>I would like {o}", "~>could I have {o}", "~>I need you to bring me {o}", "~go and bring me {o}",
    ),
    "fetch.s": (
        "bring me {o} {f}", "get me {o} {f}", "get {o} {f}", "fetch {o} {f}", "fetch me {o} {s}", "bring me {o} {s}", "bring {o} {f} to me",
        "{f}, bring me {o}", "{f} get me {o}", "take {o} {f} and bring it to me", "go and get {o} {f} for me",
        "bring {o} here {f}", "get {o} {f} for me", "grab me {o} {f}", ">I need {o} {f}", ">I want {o} {s}", ">I'd like {o} {f}",
        ">can I have {o} {f}", ">{o} is {s}, bring it to me", ">{o} {s}, I need it", ">there is {o} {s}, bring it to me",
        "~fetch me {o} {f}", "~{f}, fetch me {o}", "~>{o} is {s}, I need it", "~>may I have {o} {f}", "~give me {o} {f}",
        "~bring {o} {s} to me",
    ),
    "fetch.p": (
        "bring {p} {o}", "bring {o} to {p}", "give {o} to {p}", "give {p} {o}", "take {o} to {p}", "hand {o} to {p}",
        "deliver {o} to {p}", "hand {p} {o}", "pass {o} to {p}", "fetch {o} for {p}", "get {o} for {p}", "carry {o} to {p}",
        "hand over {o} to {p}", "get {p} {o}", ">{p} needs {o}", ">{p} wants {o}", ">{p} would like {o}", ">{p} asked for {o}",
        ">{p} is waiting for {o}", ">make sure {p} gets {o}", "take {p} {o}", "~fetch {p} {o}", "~pass {p} {o}",
        "~bring {o} over to {p}", "~>{p} would like to have {o}", "~grab {o} for {p}",
    ),
    "fetch.ps": (
        "bring {p} {o} {f}", "bring {o} {f} to {p}", "take {o} {f} to {p}", "give {p} {o} {s}", "{f}, bring {p} {o}",
        "deliver {o} {f} to {p}", "fetch {o} {f} for {p}", "get {o} {f} and bring it to {p}", "get {p} {o} {f}",
        ">{p} needs {o} {f}", ">{p} wants {o} {s}", ">{o} is {s}, take it to {p}", "carry {o} {f} to {p}",
        "~{f}, take {o} to {p}", "~give {p} {o} {f}", "~>{p} would like {o} {f}", "~get {o} {f} for {p}",
    ),
    "put": (
        "put {o} {d}", "place {o} {d}", "set {o} {d}", "lay {o} {d}", "leave {o} {d}", "bring {o} and put it {d}", "move {o} so it is {d}",
        "drop {o} {d}", "get {o} and put it {d}", "take {o} and put it {d}", "stow {o} {d}", "set {o} down {d}", "put {o} down {d}",
        "make sure {o} is {d}", "{d}, put {o}", "go and put {o} {d}", ">{o} belongs {d}", ">{o} goes {d}", ">I want {o} {d}",
        ">{o} should be {d}", ">I'd like {o} to be {d}", "~lay {o} down {d}", "~go and place {o} {d}", "~take {o} and place it {d}",
        "~>I want {o} to be {d}", "~>I'd like you to put {o} {d}",
    ),
    "put.s": (
        "put {o} {f} {d}", "move {o} {f} {d}", "take {o} {f} and put it {d}", "get {o} {f} and place it {d}", "place {o} {f} {d}",
        "pick up {o} {f} and set it {d}", "{f}, take {o} and put it {d}", "grab {o} {f} and leave it {d}", ">{o} is {s}, put it {d}",
        "bring {o} {f} and put it {d}", "~grab {o} {f} and put it {d}", "~get {o} {f} and lay it {d}", "~>{o} is {s}, place it {d}",
    ),
    "put.to": (
        "take {o} to {l}", "bring {o} to {l}", "carry {o} to {l}", "move {o} to {l}", "get {o} to {l}", "deliver {o} to {l}",
        "transport {o} to {l}", "take {o} over to {l}", ">{o} belongs to {l}", "fetch {o} and take it to {l}", "~bring {o} over to {l}",
        "~fetch {o} and carry it to {l}", "return {o} to {l}",
    ),
    "put.back": (
        "put {o} back", "put {o} back where it was", "return {o} to its place", "put {o} back where you found it",
        "take {o} back", "bring {o} back where it was", "place {o} back", "put {o} where it was before",
        "return {o} to where it was", "~take {o} back where you found it", "~bring {o} back to its place",
    ),
    "drop": (
        "put {o} down", "put down {o}", "drop {o}", "let go of {o}", "put {o} down here", "drop {o} here", "release {o}", "leave {o} here",
        "~put {o} here", "~set {o} down here", "set down {o}",
    ),
    "open": (
        "open {o}{w}", "open up {o}{w}", "go and open {o}{w}", "pull open {o}{w}", "leave {o}{w} open", "make sure {o}{w} is open",
        "unlock and open {o}{w}", ">I want {o}{w} open", ">{o}{w} should be open", ">we need {o}{w} open", "~go open {o}{w}",
        "~>I need {o}{w} open", "~go and open up {o}{w}",
    ),
    "close": (
        "close {o}{w}", "shut {o}{w}", "go and close {o}{w}", "push {o}{w} shut", "make sure {o}{w} is closed", "shut {o}{w} again",
        "pull {o}{w} shut", ">I want {o}{w} closed", ">{o}{w} should be closed", ">it is cold, close {o}{w}", "~go and shut {o}{w}",
        "~close {o}{w} again", "~>we need {o}{w} closed",
    ),
    "turn_on": (
        "turn on {o}{w}", "turn {o}{w} on", "switch on {o}{w}", "switch {o}{w} on", "start {o}{w}", "power on {o}{w}",
        "go and turn on {o}{w}", "make sure {o}{w} is on", "put {o}{w} on", ">I want {o}{w} on", ">{o}{w} should be on",
        "activate {o}{w}", "get {o}{w} going", "~power {o}{w} on", "~go and switch {o}{w} on", "~>I'd like {o}{w} on",
    ),
    "turn_off": (
        "turn off {o}{w}", "turn {o}{w} off", "switch off {o}{w}", "switch {o}{w} off", "shut off {o}{w}", "shut down {o}{w}",
        "go and turn {o}{w} off", "make sure {o}{w} is off", "power off {o}{w}", ">I want {o}{w} off", ">{o}{w} should be off",
        "deactivate {o}{w}", "~power {o}{w} off", "~go and switch off {o}{w}", "~shut {o}{w} off",
    ),
    "clean": (
        "clean {o}{w}", "clean up {o}{w}", "wipe {o}{w}", "scrub {o}{w}", "wash {o}{w}", "dust {o}{w}", "wipe down {o}{w}", "mop {o}{w}",
        "go and clean {o}{w}", "vacuum {o}{w}", "give {o}{w} a clean", "sweep {o}{w}", ">{o}{w} is dirty", ">{o}{w} needs cleaning",
        ">{o}{w} looks dirty, clean it", "tidy {o}{w}", "tidy up {o}{w}", "~go and wipe {o}{w}", "~scrub down {o}{w}",
        "~>{o}{w} is dirty, clean it", "~give {o}{w} a wash",
    ),
    "check": (
        "check if {o}{w} is {v}", "check whether {o}{w} is {v}", "check that {o}{w} is {v}", "see if {o}{w} is {v}",
        "go and see whether {o}{w} is {v}", "look whether {o}{w} is {v}", "find out if {o}{w} is {v}", ">is {o}{w} {v}",
        "verify that {o}{w} is {v}", ">did I leave {o}{w} {v}", "~go and check if {o}{w} is {v}", "~find out whether {o}{w} is {v}",
    ),
    "check_do": (
        "if {o}{w} is {v}, {c} it", "when {o}{w} is {v}, {c} it", "{c} {o}{w} if it is {v}", "check {o}{w} and {c} it if it is {v}",
        "in case {o}{w} is {v}, {c} it", "should {o}{w} be {v}, {c} it", "{c} {o}{w} in case it is {v}",
        "see if {o}{w} is {v} and if so {c} it", "~check if {o}{w} is {v} and if so {c} it", "~in case {o}{w} is {v}, then {c} it",
        "if {o}{w} is still {v}, then {c} it",
    ),
    "check_tell": (
        "tell {p} if {o}{w} is {v}", "if {o}{w} is {v}, tell {p}", "let {p} know if {o}{w} is {v}", "check if {o}{w} is {v} and tell {p}",
        "when {o}{w} is {v}, let {p} know", "inform {p} in case {o}{w} is {v}", "~let {p} know in case {o}{w} is {v}",
        "~see if {o}{w} is {v} and tell {p}",
    ),
    "tell": (
        "tell {p} {t}", "tell {p} that {t}", "say to {p} {t}", "let {p} know that {t}", "go to {p} and say {t}", "inform {p} that {t}",
        "give {p} this message: {t}", "remind {p} that {t}", "tell {p}: {t}", "let {p} know: {t}", "~go to {p} and say: {t}",
        "~let {p} know this: {t}", "pass this on to {p}: {t}", "~inform {p}: {t}", "go and tell {p} {t}",
    ),
    "tell.to": ("tell {p} to {t}", "ask {p} to {t}", "go and tell {p} to {t}", "remind {p} to {t}",
                "~go and ask {p} to {t}"),
    "tell.if": ("ask {p} if {x} {t}", "ask {p} whether {x} {t}", "find out from {p} if {x} {t}", "go and ask {p} if {x} {t}",
                "~go and ask {p} whether {x} {t}", "~find out from {p} whether {x} {t}"),
    "say": ("say {t}", "say: {t}", "announce {t}", "call out {t}", "say out loud {t}", "shout {t}", "repeat after me: {t}",
            "~announce: {t}", "~shout: {t}", "speak the words {t}"),
    "wait": (
        "wait {n}", "wait for {n}", "pause for {n}", "stay there for {n}", "stay for {n}", "wait here for {n}", "hold on for {n}",
        "do nothing for {n}", "rest for {n}", "take a break of {n}", "stay here for {n}", "sleep for {n}", "~pause here for {n}",
        "~rest here for {n}", "~take a break for {n}",
    ),
    "follow": ("follow {p}", "go with {p}", "stay with {p}", "walk behind {p}", "come along with {p}", "keep following {p}", "accompany {p}",
               "~stay behind {p}", "~go along with {p}"),
    "follow.me": ("follow me", "come with me", "stay with me", "walk behind me", "come along", "come along with me", "keep following me",
                  ">I want you to follow me", "~stay behind me", "~go with me"),
    "stop": ("stop", "stop it", "halt", "stop right there", "freeze", "stop moving", "stop now", "abort", "emergency stop", "stand still",
             "stop what you are doing", "don't move", "~stop right now", "~halt now", "~stop moving now"),
}

WRAPPERS: tuple[str, ...] = (
    "{c}", "please {c}", "{c} please", "{c}, please", "could you {c}", "can you {c}", "could you please {c}", "can you please {c}",
    "would you {c}", "would you please {c}", "I want you to {c}", "I'd like you to {c}", "I need you to {c}", "robot, {c}", "hey, {c}",
    "hey robot, {c}", "hi, {c}", "hello, could you {c}", "ok, {c}", "okay robot, {c}", "now {c}", "now, {c}", "{c} now", "next, {c}",
    "kindly {c}", "you should {c}", "go ahead and {c}", "{c}, thanks", "{c}, thank you", "just {c}", "pls {c}", "{c} pls", "quickly {c}",
    "{c} right away", "{c} as soon as possible", "{c} when you have time", "your next task: {c}", "let's {c}", "I'd be glad if you could {c}",
    "be so kind and {c}", "do me a favor and {c}", "would it be possible to {c}", "your job is to {c}", "alright, {c}", "well, {c}",
    "~hello robot, {c}", "~okay, could you please {c}", "~{c} as soon as you have time", "~robot, your next job is to {c}",
    "~hi robot, can you {c}", "~well, I need you to {c}", "~do me a favor, {c}, thanks",
)

JOINERS: tuple[str, ...] = (
    "{a} and {b}", "{a} and then {b}", "{a}, then {b}", "{a} then {b}", "{a}. then {b}", "{a}, and then {b}", "first {a}, then {b}",
    "first {a} and then {b}", "{a}, after that {b}", "{a}. after that, {b}", "{a}, and {b}", "{a}; {b}", "{a}. {b}", "{a}. next, {b}",
    "{a}. when you are done, {b}", "{a} and afterwards {b}", "{a} before you {b}", "after you {a}, {b}", "once you {a}, {b}",
    "~first {a}, after that {b}", "~{a} and after that {b}", "~{a}. when done, {b}", "~{a}. afterwards {b}",
)
REVERSED_JOINERS: tuple[str, ...] = (
    "before you {b}, {a}", "{b} after you {a}", "{b}, but first {a}", "{b}, but before that {a}", "{b} once you {a}",
    "~{b}, but before you do that {a}", "~before you {b}, first {a}",
)
DELAYS: tuple[str, ...] = ("in {n}, {c}", "after {n}, {c}", "wait {n} and {c}", "{c} in {n}", "{c} after {n}", "wait {n}, then {c}",
                           "~wait for {n} and then {c}", "~{c}, but wait {n} first", "{c}, but only after {n}")
AGAIN = ("do it again", "again", "do that again", "once more", "repeat that", "one more time", "repeat the last plan", "~do it once more",
         "~repeat it")
SAME = ("do the same with {o}", "the same with {o}", "{o} too", "and {o} too", "also {o}", "and also {o}", "now {o}", "the same for {o}",
        "do the same for {o}", "~now the same with {o}", "~and now {o}")
CORRECTION = ("no, {o}", "no, I meant {o}", "I meant {o}", "sorry, {o}", "not that one, {o}", "wait, I meant {o}", "no, not that, {o}",
              "actually, {o}", "~sorry, I meant {o}", "~no, not that one, {o}")
ANSWER_PLACE = ("{d}", "{d}, please", "put it {d}", "just {d}", "{d} is fine", "place it {d}", "~{d} please", "~just put it {d}")
ANSWER_OBJECT = ("{o}", "{o}, please", "{o} of course", "I mean {o}", "~{o} please", "~of course {o}")
ANSWER_DURATION = ("{n}", "{n}, please", "for {n}", "about {n}", "{n} will do", "~for {n}, please", "~about {n}, please")
ANSWER_PERSON = ("{p}", "{p}, please", "to {p}", "{p} of course", "I mean {p}", "~to {p}, please")
