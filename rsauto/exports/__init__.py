"""From a study to what others run: adapters, a merged model, settings of other trainers, a card.

request    what is asked for, and what of it is refused before anything is read
chosen     the trial, its base model and its data
weights    an adapter as plain LoRA or as PEFT's AdaLoRA; merged, the whole model
parity     the logits of what is written against those of what was trained
recipe     a trial in numbers that other trainers know, and what they cannot express
axolotl, llamafactory, trl, snippet     the recipe in the words of each
run        all of it in order, into a folder that is there whole or not at all
"""
