"""Every error code with its exit code, its title and its long form, as `edgewright explain` prints it.

A code keeps its meaning for ever. The hundreds say what is wrong: 1 recipe and command line, 2 text, 3 models and
files, 4 resources, 5 export and gate, 6 runtimes, 7 training, 9 network.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What a code means."""

    exit_code: int
    title: str
    text: str


CATALOGUE: dict[str, Entry] = {
    # --- recipe and command line ---
    "EW-100": Entry(
        2,
        "The command line is not understood",
        "A command, an option or an argument is unknown, missing or of a wrong kind. `edgewright --help` lists the "
        "commands, and --help after a command its options. Overrides are written section.key=value, without dashes.",
    ),
    "EW-101": Entry(
        2,
        "The recipe cannot be read",
        "There is no such file, it is a directory, it is larger than any recipe is, or it is not text in UTF-8; then the "
        "first bad byte is given by line and column. Check the path, or save the file as UTF-8.",
    ),
    "EW-102": Entry(
        2,
        "The recipe is not valid YAML",
        "Recipes are YAML 1.2. Indent with spaces, never with tabs, and put text that holds : # [ ] { } * & ! or % in "
        "quotes. Line and column are where the parser gave up; the cause may be on the line before.",
    ),
    "EW-103": Entry(
        2,
        "The file is no recipe",
        "A recipe is a mapping of sections: version, name, data, stages and so on. This file is empty, or a list, or a "
        "single value. Start from one of examples/*.yaml.",
    ),
    "EW-104": Entry(
        2,
        "A key occurs twice",
        "Most YAML readers would silently keep one of the two values. Remove the one that is not meant.",
    ),
    "EW-105": Entry(
        2,
        "YAML that no recipe needs",
        "Tags such as !!python/object, keys that are no plain words, infinities and NaN, and anchors that expand to a huge "
        "document are refused. Write plain values.",
    ),
    "EW-110": Entry(
        2,
        "Unknown key",
        "Recipes have no ignored keys: a misspelt one would leave a default in force without a word. The nearest valid key "
        "is shown, or the section where the key belongs. `edgewright check --schema` prints the JSON Schema of recipes, "
        "with which editors complete keys.",
    ),
    "EW-111": Entry(
        2,
        "A required key is missing",
        "The position is that of the section that should hold it. Sections of which there are several kinds always need "
        "`type:`.",
    ),
    "EW-112": Entry(
        2,
        "A value is of the wrong type",
        "Numbers, true and false are written without quotes; text that looks like one of them with quotes. In YAML 1.2, "
        "1e-4 is a number and yes, no, on and off are text.",
    ),
    "EW-113": Entry(
        2,
        "A value is not allowed",
        "The value is of the right type, but out of range, none of the choices, or of a wrong form. What is allowed is "
        "shown under `expected`.",
    ),
    "EW-114": Entry(
        2,
        "Unknown type",
        "`type:` picks the component of a section: the source of data, the student, the objective, a method, the optimizer, "
        "the schedule. The valid names are shown; each is also the name of a file in the package.",
    ),
    "EW-115": Entry(
        2,
        "A section does not hold together",
        "Each of its keys is fine by itself, but not all of them at once. `expected` says what they would have to be, for "
        "example exactly one of max_steps and max_tokens.",
    ),
    "EW-116": Entry(
        2,
        "An override cannot be applied",
        "Overrides are section.key=value. The value is YAML. Items of a list are named by index or by their name: "
        "stages.0.budget.max_steps=10 or stages.student.budget.max_steps=10. Quote the whole word for the shell if it "
        "holds spaces, * or braces.",
    ),
    "EW-120": Entry(
        2,
        "Two stages or exports have the same name",
        "Names are folders and are referred to from elsewhere. Rename one of the two.",
    ),
    "EW-121": Entry(
        2,
        "No earlier stage of that name",
        "A student or teacher of type `stage` is the result of a stage that ran before: stages run in the order of the "
        "recipe. Correct the name, or move the stage.",
    ),
    "EW-122": Entry(
        2,
        "The model of an export is unknown",
        "`model:` of an export is the name of a stage, or the path of a model directory, relative to the recipe file. "
        "Write ./NAME if a directory has the name of a stage.",
    ),
    "EW-123": Entry(2, "Unknown target", "`to:` of an export names the runtime's format. The valid ones are shown."),
    "EW-124": Entry(
        2,
        "The target has no such width",
        "Widths are called as the target calls them: f16, q8_0, tq2_0 and so on for gguf; fp32, int8, int4, ternary for "
        "genai. Token embedding and head have a shorter list of their own.",
    ),
    "EW-125": Entry(
        2,
        "Methods that cannot be combined",
        "Two methods of one stage would both represent the same weights. Remove one, or put them into stages that follow "
        "each other.",
    ),
    "EW-130": Entry(
        2,
        "Another tokenizer than that of the data",
        "Ids of one tokenizer mean nothing to a model of another one, so a teacher or a starting checkpoint must have the "
        "tokenizer with which the data are encoded. The first id that differs is named, with both tokens. Ids that only pad "
        "the vocabulary are fine. Usually the fix is data.tokenizer={type: pretrained, path: THE MODEL}.",
    ),
    "EW-131": Entry(
        2,
        "The corpus has no text",
        "Files were found, but every document in them is blank. Point `data` to files with text.",
    ),
    "EW-190": Entry(
        2,
        "Nothing to measure",
        "bench wants at least one file, and positive numbers of tokens and repeats.",
    ),
    "EW-191": Entry(
        2,
        "Settings that cannot generate",
        "The number of new tokens must be positive, and the temperature 0 (greedy) or positive and finite.",
    ),
    "EW-192": Entry(
        2,
        "Unknown error code",
        "Codes are written EW- and three digits, at the end of the first line of an error.",
    ),
    # --- text ---
    "EW-201": Entry(
        3,
        "Text with invalid UTF-8 or NUL",
        "The file and line are given. data.on_bad_text decides: strict stops here, skip drops the document, replace puts "
        "U+FFFD in the place of bad bytes; the last two are counted in the report. Binary files among the text are usually "
        "the cause: narrow the pattern.",
    ),
    "EW-202": Entry(
        3,
        "A document cannot be read",
        "A line of a .jsonl file is no JSON object, or has no text under data.text_key. Correct the line or the key, or set "
        "data.on_bad_text=skip.",
    ),
    "EW-203": Entry(
        3,
        "No data there",
        "No file matches the pattern, or the data set does not exist. Patterns in a recipe start at the recipe's folder, "
        "those of overrides at the working directory; ** goes through folders.",
    ),
    "EW-204": Entry(
        3,
        "A kind of file that cannot be read",
        "Text comes from .txt, .md, .py and .jsonl, each also as .gz, .xz or .zst. Narrow the pattern or convert the file.",
    ),
    "EW-205": Entry(
        3,
        "A compressed file is damaged",
        "It ends too early or does not decompress. Fetch or compress it again.",
    ),
    "EW-206": Entry(
        3, "A file cannot be read", "The operating system refuses it: see the reason. Check its permissions."
    ),
    "EW-207": Entry(
        3,
        "A package for this data is not installed",
        "The optional packages of data sets and .zst files come with: pip install 'edgewright[data]'.",
    ),
    "EW-208": Entry(
        3,
        "A line of JSON is too long",
        "A line of a .jsonl file must fit into memory to be parsed. Split the document into several lines, or store it as "
        ".txt, which is read in pieces.",
    ),
    "EW-210": Entry(
        3,
        "The corpus is empty",
        "No document is left after blank, bad and duplicate ones were dropped; the counts of each are shown. Point `data` "
        "to text.",
    ),
    "EW-211": Entry(
        3,
        "A split is empty",
        "Documents are split by a hash of their name, so a corpus of few documents may leave nothing for training or for "
        "evaluation. Give more documents, or another data.held_out.",
    ),
    "EW-212": Entry(
        3,
        "Less text than one sequence",
        "The split has fewer tokens than data.sequence_length. Give more text or shorter sequences.",
    ),
    "EW-220": Entry(
        3,
        "The tokenizer cannot be read",
        "A tokenizer is a directory with a tokenizer.json that the library `tokenizers` opens. Older ones are converted by "
        "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW_DIR).",
    ),
    "EW-221": Entry(
        3,
        "The tokenizer has no end-of-text token",
        "Documents are kept apart by it. Name a token of the vocabulary as eos_token in tokenizer_config.json.",
    ),
    # --- models and files ---
    "EW-310": Entry(
        3,
        "No model directory",
        "A model is a directory with config.json, *.safetensors and tokenizer.json, as save_pretrained writes it. Nothing "
        "is ever downloaded: fetch a model from a hub first.",
    ),
    "EW-311": Entry(
        3,
        "A file is missing",
        "A part of a model is not there, or a pipe or device stands in its place. The name is shown, and what is there.",
    ),
    "EW-312": Entry(
        3,
        "A JSON file of the model is damaged",
        "It is no JSON object in UTF-8, has a key twice, or is too large to be one of these files. Copy it again.",
    ),
    "EW-313": Entry(
        8,
        "The model's configuration names code",
        "Keys such as auto_map, and kernels named by a repository, make libraries run code that comes with a model. This is "
        "refused, for local directories as well, and there is no option to allow it. If transformers knows the "
        "architecture by itself, remove the key.",
    ),
    "EW-314": Entry(
        8,
        "The model directory holds code",
        "Python files and native libraries have no place in a model that is data. If transformers knows the architecture by "
        "itself, delete them.",
    ),
    "EW-315": Entry(
        8,
        "A pickle",
        "Opening a pickle can run any code, and no scanner is safe. Files are judged by content, whatever their name says. "
        "Ask the author for safetensors, or convert the file where nothing can be harmed.",
    ),
    "EW-316": Entry(
        8,
        "A link leads out of the model directory",
        "A link could make a tool read or ship any file of this machine. Copy the model with its links resolved: "
        "cp -rL DIR COPY. The cache of a hub is made of such links: download with --local-dir.",
    ),
    "EW-317": Entry(
        3,
        "A safetensors file is damaged",
        "Header, shapes, offsets and the size of the file do not agree; usually the copy was cut off. What was expected and "
        "found is shown for the first tensor that is wrong. Copy or download it again.",
    ),
    "EW-318": Entry(
        3,
        "A GGUF file is damaged",
        "Counts, lengths, offsets and the size of the file do not agree. No runtime gets to see such a file. Copy, download "
        "or export it again.",
    ),
    "EW-319": Entry(
        3,
        "The index of the weights is damaged",
        "model.safetensors.index.json must map each tensor to the name of a file beside it. Copy it again.",
    ),
    "EW-320": Entry(
        3,
        "The lattice beside the model cannot be read",
        "lattice.safetensors holds the integer codes and scales of quantized weights. It is damaged or of another version. "
        "Delete it to export from the weights alone, or copy the model again.",
    ),
    "EW-321": Entry(
        3,
        "Lattice and weights differ",
        "The codes times scales in lattice.safetensors must equal the weights bit for bit. The model was changed after it "
        "was written. Delete lattice.safetensors if the weights are right.",
    ),
    "EW-322": Entry(
        3,
        "A tensor is missing or of the wrong kind",
        "The model lacks a tensor that its configuration promises, or holds it as something else than plain floats. Save it "
        "again in float32, float16 or bfloat16.",
    ),
    "EW-323": Entry(
        3,
        "A weight is not finite",
        "A tensor holds NaN or infinity. Such a model has diverged or was damaged; go back to an earlier checkpoint.",
    ),
    "EW-390": Entry(
        3,
        "No model that can be opened",
        "The path is no model directory, GGUF file or GenAI folder.",
    ),
    "EW-391": Entry(
        3, "The manifest is incomplete", "edgewright.json does not say all of the artifact. Export it again."
    ),
    "EW-392": Entry(3, "No run directory", "The directory of a run holds recipe.yaml and stages/. Check the path."),
    "EW-393": Entry(
        3,
        "A file of the run cannot be understood",
        "It is damaged or of another version. Run the recipe again: what is done is kept.",
    ),
    # --- resources ---
    "EW-401": Entry(
        4,
        "The disk is full",
        "Writing stopped; the last good checkpoint and every finished file are intact. Free space and run the same command "
        "again.",
    ),
    "EW-402": Entry(
        6,
        "Another process works in this run directory",
        "Two runs in one directory would spoil each other. The process and host are shown. The lock vanishes with its "
        "holder, so a killed run leaves none behind.",
    ),
    "EW-403": Entry(
        4,
        "The disk is too small for this run",
        "Checkpoints (weights and optimizer, one more than are kept), the final models and the exports would not fit. Free "
        "space, choose another output_dir, or lower training.keep_checkpoints.",
    ),
    "EW-404": Entry(
        4,
        "Memory ran out",
        "Lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor; then shorten "
        "sequence_length; then take a smaller model.",
    ),
    # --- export and gate ---
    "EW-501": Entry(2, "Unknown target", "export writes gguf (llama.cpp) and genai (ONNX Runtime GenAI)."),
    "EW-502": Entry(
        2,
        "The target has no such width",
        "Widths are called as the target calls them; the valid ones are shown.",
    ),
    "EW-503": Entry(
        2,
        "The target has no such width for the embedding",
        "Token embedding and output head have a list of widths of their own; the valid ones are shown.",
    ),
    "EW-504": Entry(
        5,
        "The gate failed",
        "The file was opened in its own runtime and is not the model that it was made from; the measures that failed are "
        "shown. Nothing was left at the final path. For a narrow width a higher --max-kl may be what you want; for a "
        "lossless one this is a fault to report.",
    ),
    "EW-505": Entry(
        3,
        "llama.cpp cannot hold this model",
        "The llama architecture of GGUF has no place for something in this model: see what. Export to genai instead.",
    ),
    "EW-506": Entry(
        3,
        "llama.cpp has no such tokenizer",
        "llama.cpp knows a list of ways to cut text, and this tokenizer is none of them. Export to genai instead.",
    ),
    "EW-507": Entry(
        3,
        "Tokenizer and model do not belong together",
        "The tokenizer has other ids than the model has rows. Put the right tokenizer.json into the model's directory.",
    ),
    "EW-508": Entry(
        3,
        "Values too large for the width",
        "A tensor holds values beyond the range of the width. Choose f32 or q8_0 for it.",
    ),
    "EW-509": Entry(
        2,
        "The export would overwrite something else",
        "--out names a file or folder that no export wrote. Choose another one, or move it away.",
    ),
    "EW-520": Entry(
        3,
        "The GenAI model builder refuses the model",
        "ONNX Runtime GenAI's own builder turns the checkpoint into a graph, offline and in a process of its own. It knows "
        "the Llama family and its relatives; the last line of what it said is shown. Save model and tokenizer again with "
        "save_pretrained, or export to gguf.",
    ),
    "EW-521": Entry(
        5,
        "The graph does not hold a weight of the checkpoint",
        "After the builder has run, every weight in its graph is compared with the checkpoint, bit for bit. A difference "
        "means that this architecture is laid out in a way that the exporter does not know. Nothing was written. Export to "
        "another target and report the architecture.",
    ),
    "EW-522": Entry(
        3,
        "The attention heads do not fit the target",
        "ONNX Runtime's attention needs a head size that is a multiple of 8. Train with another head size, or export to "
        "gguf.",
    ),
    # --- runtimes ---
    "EW-601": Entry(
        3,
        "No model that a runtime opens",
        "A model is a Hugging Face directory, a .gguf file, a folder with exactly one of those, or a folder with "
        "genai_config.json.",
    ),
    "EW-602": Entry(
        3,
        "Too long, or no token of the model",
        "The text does not fit into the model's context, or an id is beyond its vocabulary. Shorten the text.",
    ),
    "EW-603": Entry(
        3,
        "The runtime of this model is not installed",
        "The package of the runtime is an optional one. Install it with the line that the message shows, for example "
        "pip install 'edgewright[genai]'.",
    ),
    "EW-604": Entry(
        3,
        "The runtime refuses the model",
        "The file passed our checks, but its own runtime cannot run it; what it said is shown. Export the model again; a "
        "folder from another tool must give the logits of all positions.",
    ),
    "EW-605": Entry(
        3,
        "The runtime takes no draft here",
        "Some runtimes decode speculatively only with a draft that lies in the same folder, or not at all.",
    ),
    "EW-606": Entry(3, "Nothing to generate from", "A prompt needs at least one token."),
    "EW-607": Entry(
        3,
        "Two models with different vocabularies",
        "Logits can only be compared between models with the same number of tokens. Is this the right model?",
    ),
    "EW-608": Entry(
        3,
        "The compiler does not work",
        "torch.compile needs a C++ compiler with its standard library. Install g++ or clang; without it training runs, but "
        "slower.",
    ),
    "EW-610": Entry(
        3,
        "The process that measured a file died",
        "Every file is measured in a process of its own. It was killed or crashed, usually for lack of memory; its last "
        "words are shown.",
    ),
    "EW-611": Entry(
        3,
        "The test is longer than the context",
        "prompt + generate of bench must fit into the context of every model. Choose shorter ones.",
    ),
    "EW-612": Entry(
        3,
        "Prompt and answer do not fit",
        "The prompt with max_new_tokens must fit into the model's context. Shorten one of the two.",
    ),
    # --- training ---
    "EW-701": Entry(
        7,
        "Training diverged",
        "Loss or gradients were not finite again and again, although the run went back to the last good checkpoint and "
        "skipped the batches that did it (they are in metrics.jsonl). Lower the learning rate, lengthen the warm-up, or "
        "use precision: fp32.",
    ),
    "EW-702": Entry(
        3,
        "A model's vocabulary is too small",
        "The model has fewer rows than the tokenizer has tokens, or the teacher fewer than the student. Take the model's "
        "own tokenizer: data.tokenizer={type: pretrained, path: THE MODEL}.",
    ),
    "EW-703": Entry(
        2,
        "The ternary group does not divide a row",
        "With granularity: group, the columns of every linear layer must be a multiple of the group. Use granularity: row.",
    ),
    "EW-704": Entry(
        2,
        "A method changed nothing",
        "A method that finds no layer to change would be a silent no-op. Check its `exclude`, and the architecture.",
    ),
    "EW-705": Entry(
        2,
        "The run was begun with another recipe",
        "A run goes on bit for bit, so the recipe of a stage that has begun cannot change. What differs is shown. Undo the "
        "change, choose another output_dir, or start again with --fresh.",
    ),
    "EW-706": Entry(
        2,
        "Sequences longer than the model's context",
        "data.sequence_length must not exceed max_position_embeddings of the model that the stage starts from.",
    ),
    # --- network ---
    "EW-901": Entry(
        9,
        "Something would have to be downloaded",
        "Nothing is fetched unless the recipe says so: data.allow_download=true, or download it before with the command "
        "that is shown.",
    ),
}
