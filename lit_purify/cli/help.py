"""The page that ``--help`` prints: commands, the settings that people need, examples."""

EVALUATE = """\
usage: eval.py [COMMAND] [--config FILE] [--SETTING VALUE ...]

Attacks defenses and reports what survives. Without arguments: the embedded digits, with the weights that ship.

commands
  test        attack every defense, write records, summary and report (what is done when no command is given)
  frontier    the same for whole families of defenses, compared at equal clean accuracy
  gradcheck   are the gradients that attacks follow those of the defense?
  audit       do other attacks, more steps, draws or other gradients find more?
  compare     finished evaluations side by side: compare RUN RUN ...
  purify      your own images through a defense, with masks and overlays
  predict     the same, with the classes that the classifier then sees, as CSV

settings
  --config FILE                    what to evaluate (default: configs/eval/digits.yaml)
  --run FOLDER                     where records and report go (default: runs/NAME_OF_THE_CONFIG);
                                   the same command again goes on after an interruption
  --dry_run                        test, frontier: measure what it will cost, and end
  --runs N                         runs of each sample with fresh noise
  --chunk N                        rows of a network call: less memory with fewer
  --attacks.NAME.steps N           steps of an attack; likewise eps, eot ...
  --defenses.NAME.steps N          steps of a defense; likewise level, high, low ...
  --defenses.NAME null             leaves a defense out; likewise an attack
  --data.batch_size N              samples between two records on the disk
  --data.subset.n N                how many samples
  --trainer.devices N              processes or GPUs
  --trainer.logger false           nothing to Weights & Biases
  gradcheck, audit:
  --samples N                      how many of the evaluated samples, from the first (gradcheck: 4, audit: 32)
  audit:
  --audit_runs N --proposals N     runs of each image (8), steps of the black-box attack (100)
  purify, predict, of a configuration that is named:
  --input FOLDER --output FOLDER   images to read, and where PNGs go (the input may be one file)
  --defense NAME                   which defense (default: the first with a mask)
  --existing skip                  go on after an interruption; replace writes anew
  --overlays false                 purified images alone

examples
  python eval.py --config configs/eval/folder.yaml --data.root my/images --dry_run
  python eval.py --run runs/strong --attacks.pgd.steps 50
  python eval.py predict --config configs/eval/folder.yaml --input my/images --output purified

All settings: eval.py COMMAND --help_all. Of a class: eval.py --data.help CIFAR10, eval.py --classifier.help Classifier.
What a run will do: eval.py ... --print_config.
"""

TRAIN = """\
usage: train.py COMMAND --config FILE [--SETTING VALUE ...]

Trains denoisers for maps of noise levels, and classifiers.

commands
  fit         train; writes checkpoints, and the network as model.safetensors
  validate    measure the loss on the validation split
  export      write the network of a checkpoint, or a public one as it is configured, as safetensors

settings
  --config FILE                    what to train: one of configs/train, or yours
  --run FOLDER                     where everything goes (default: runs/NAME_OF_THE_CONFIG)
  --ckpt_path FILE                 go on from RUN/checkpoints/last.ckpt; for export: the checkpoint
  --data.root FOLDER               where the images lie
  --data.batch_size N              samples a step and process
  --trainer.max_steps N            how long
  --trainer.devices N              processes or GPUs
  --trainer.precision bf16-mixed   faster on GPUs
  --trainer.logger false           nothing to Weights & Biases
  --seed_everything N              of weights, noise and shuffling
  --output FILE                    export: the file to write

examples
  python train.py fit --config configs/train/digits_denoiser.yaml
  python train.py fit --config configs/train/folder_denoiser.yaml --data.root my/images
  python train.py export --config configs/train/folder_denoiser.yaml --ckpt_path CHECKPOINT --output mine.safetensors

All settings: train.py COMMAND --help_all. Of a class: train.py fit --model.help DenoiserTask.
What a run will do: train.py fit ... --print_config.
"""
