package image

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// Bounds of a Dockerfile.
const (
	maxDockerfile  = 4 << 20 // bytes
	maxSteps       = 2000
	maxInstruction = 1 << 20 // bytes of one instruction
)

// ParseDockerfile reads a Dockerfile. Supported are FROM (several stages), ARG,
// RUN (shell and exec form, here-documents), COPY and ADD of local files, ENV,
// WORKDIR, USER, CMD, ENTRYPOINT, EXPOSE, LABEL and SHELL; MAINTAINER, VOLUME,
// STOPSIGNAL and HEALTHCHECK mean nothing to a sandbox and are skipped. Anything
// else fails with Invalid or Unsupported and the number of the line.
func ParseDockerfile(r io.Reader) (Recipe, error) {
	const op = "image.ParseDockerfile"
	text, err := io.ReadAll(io.LimitReader(r, maxDockerfile+1))
	if err != nil {
		return Recipe{}, fail(op, "", err)
	}
	if len(text) > maxDockerfile {
		return Recipe{}, sandbox.Errorf(op, sandbox.Invalid, "", "the file is larger than %d bytes", maxDockerfile)
	}
	instructions, err := splitInstructions(string(text))
	if err != nil {
		return Recipe{}, sandbox.E(op, "", "", err)
	}
	var recipe Recipe
	for n, i := range instructions {
		if n >= maxSteps {
			return Recipe{}, sandbox.Errorf(op, sandbox.Invalid, "", "more than %d instructions", maxSteps)
		}
		if err := recipe.add(i); err != nil {
			return Recipe{}, sandbox.E(op, "", fmt.Sprintf("line %d", i.line), err)
		}
	}
	if len(recipe.Stages) == 0 {
		return Recipe{}, sandbox.Errorf(op, sandbox.Invalid, "", "there is no FROM")
	}
	return recipe, nil
}

// instruction is one instruction with its continuation lines joined.
type instruction struct {
	word string // in upper case
	rest string
	body string // of a here-document
	line int    // of the first line, from 1
}

// text is the instruction as people wrote it, on one line.
func (i instruction) text() string { return strings.TrimSpace(i.word + " " + i.rest) }

func invalid(format string, args ...any) error {
	return sandbox.Errorf("parse", sandbox.Invalid, "", format, args...)
}

func unsupported(format string, args ...any) error {
	return sandbox.Errorf("parse", sandbox.Unsupported, "", format, args...)
}

var directive = regexp.MustCompile(`^#\s*([a-zA-Z]+)\s*=\s*(\S+)\s*$`)

// splitInstructions joins continuation lines, drops comments and collects
// here-documents.
func splitInstructions(text string) ([]instruction, error) {
	lines := bufio.NewScanner(strings.NewReader(strings.TrimPrefix(text, "\ufeff")))
	lines.Buffer(nil, maxInstruction)
	escape := "\\"
	var out []instruction
	number, joined, start, directives := 0, "", 0, true
	for lines.Scan() {
		number++
		line := strings.TrimRight(lines.Text(), "\r")
		if m := directive.FindStringSubmatch(line); directives && m != nil {
			if strings.EqualFold(m[1], "escape") {
				if m[2] != "\\" && m[2] != "`" {
					return nil, invalid("line %d: the escape character is %q, and must be \\ or `", number, m[2])
				}
				escape = m[2]
			}
			continue
		}
		directives = false
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "#") || trimmed == "" {
			continue // also between continuation lines
		}
		if joined == "" {
			start = number
		}
		if part, more := strings.CutSuffix(strings.TrimRight(line, " \t"), escape); more {
			joined += part
			if len(joined) > maxInstruction {
				return nil, invalid("line %d: the instruction is larger than %d bytes", start, maxInstruction)
			}
			continue
		}
		i := newInstruction(joined+line, start)
		joined = ""
		if err := i.readBody(lines, &number); err != nil {
			return nil, err
		}
		out = append(out, i)
	}
	if err := lines.Err(); err != nil {
		return nil, invalid("line %d: %v", number+1, err)
	}
	if strings.TrimSpace(joined) != "" {
		out = append(out, newInstruction(joined, start))
	}
	return out, nil
}

func newInstruction(text string, line int) instruction {
	text = strings.TrimSpace(text)
	word, rest := text, ""
	if at := strings.IndexAny(text, " \t"); at >= 0 {
		word, rest = text[:at], strings.TrimSpace(text[at:])
	}
	return instruction{word: strings.ToUpper(word), rest: rest, line: line}
}

var hereDocument = regexp.MustCompile(`<<(-?)(["']?)([A-Za-z_][A-Za-z0-9_]*)["']?`)

// readBody reads the here-documents that a RUN announces.
func (i *instruction) readBody(lines *bufio.Scanner, number *int) error {
	if i.word != "RUN" && i.word != "COPY" && i.word != "ADD" || strings.Contains(i.rest, "<<<") {
		return nil
	}
	for _, m := range hereDocument.FindAllStringSubmatch(i.rest, -1) {
		ended := false
		for !ended && lines.Scan() {
			*number++
			line := strings.TrimRight(lines.Text(), "\r")
			end := line
			if m[1] == "-" {
				end = strings.TrimLeft(line, "\t")
			}
			ended = end == m[3]
			i.body += line + "\n"
			if len(i.body) > maxInstruction {
				return invalid("line %d: the here-document is larger than %d bytes", i.line, maxInstruction)
			}
		}
		if !ended {
			return invalid("line %d: the here-document has no line %q at its end", i.line, m[3])
		}
	}
	return nil
}

// add appends an instruction to the recipe.
func (r *Recipe) add(i instruction) error {
	if i.word == "FROM" {
		return r.addStage(i)
	}
	step, err := i.step()
	if err != nil || step == nil {
		return err
	}
	if len(r.Stages) == 0 {
		if step.Op != OpArg {
			return invalid("%s stands before the first FROM", i.word)
		}
		r.Args = append(r.Args, *step)
		return nil
	}
	last := &r.Stages[len(r.Stages)-1]
	last.Steps = append(last.Steps, *step)
	return nil
}

func (r *Recipe) addStage(i instruction) error {
	flags, words, err := i.words()
	if err != nil {
		return err
	}
	for key := range flags {
		return unsupported("FROM --%s is not supported", key)
	}
	switch {
	case len(words) == 1:
		r.Stages = append(r.Stages, Stage{From: words[0]})
	case len(words) == 3 && strings.EqualFold(words[1], "AS"):
		name := strings.ToLower(words[2])
		if slices.ContainsFunc(r.Stages, func(s Stage) bool { return s.Name == name }) {
			return invalid("there are two stages %q", name)
		}
		r.Stages = append(r.Stages, Stage{From: words[0], Name: name})
	default:
		return invalid("FROM wants IMAGE or IMAGE AS NAME")
	}
	return nil
}

// step turns an instruction into a step; nil for one that means nothing here.
func (i instruction) step() (*Step, error) {
	s := &Step{Line: i.line, Text: i.text(), Raw: true}
	switch i.word {
	case "RUN":
		return s, i.run(s)
	case "CMD", "ENTRYPOINT":
		s.Op = Op(strings.ToLower(i.word))
		i.command(s)
		return s, nil
	case "COPY", "ADD":
		s.Op = Op(strings.ToLower(i.word))
		return s, i.copy(s)
	case "ENV", "LABEL":
		s.Op = Op(strings.ToLower(i.word))
		return s, i.pairs(s)
	case "ARG", "EXPOSE":
		s.Op = Op(strings.ToLower(i.word))
		return s, i.plain(s, 1, 1000)
	case "WORKDIR", "USER":
		s.Op = Op(strings.ToLower(i.word))
		return s, i.plain(s, 1, 1)
	case "SHELL":
		s.Op = OpShell
		if i.command(s); !s.Exec || len(s.Args) == 0 {
			return nil, invalid("SHELL wants a JSON array")
		}
		return s, nil
	case "MAINTAINER", "VOLUME", "STOPSIGNAL", "HEALTHCHECK":
		return nil, nil
	case "ONBUILD":
		return nil, unsupported("%s is not supported", i.word)
	}
	return nil, invalid("unknown instruction %q", i.word)
}

// command reads the shell form or the exec form, which is a JSON array.
func (i instruction) command(s *Step) {
	s.Raw = false
	var argv []string
	if strings.HasPrefix(i.rest, "[") && json.Unmarshal([]byte(i.rest), &argv) == nil {
		s.Exec, s.Args = true, argv
		return
	}
	s.Args = []string{i.rest}
}

func (i instruction) run(s *Step) error {
	s.Op = OpRun
	if strings.HasPrefix(i.rest, "--") {
		flag, _, _ := strings.Cut(i.rest, " ")
		return unsupported("RUN %s is not supported", flag)
	}
	if i.rest == "" {
		return invalid("RUN wants a command")
	}
	i.command(s)
	if s.Exec && len(s.Args) == 0 {
		return invalid("RUN wants a command")
	}
	if i.body == "" || s.Exec {
		return nil
	}
	if m := hereDocument.FindStringSubmatch(i.rest); m[0] == i.rest { // the document is the script
		body := i.body[:strings.LastIndex(strings.TrimSuffix(i.body, "\n"), "\n")+1]
		if m[1] == "-" {
			body = leadingTabs.ReplaceAllString(body, "")
		}
		s.Args = []string{body}
		return nil
	}
	s.Args = []string{i.rest + "\n" + i.body} // the shell knows what to do with it
	return nil
}

var leadingTabs = regexp.MustCompile(`(?m)^\t+`)

func (i instruction) copy(s *Step) error {
	if i.body != "" {
		return unsupported("%s of a here-document is not supported", i.word)
	}
	flags, words, err := i.words()
	if err != nil {
		return err
	}
	for key, value := range flags {
		switch {
		case key == "from" && i.word == "COPY":
			s.From = value
		case key == "chown":
			s.Chown = value
		case key == "chmod":
			if _, err := strconv.ParseUint(value, 8, 12); err != nil {
				return unsupported("--chmod=%s: only octal modes are supported", value)
			}
			s.Chmod = value
		case key == "link": // how it is done, not what
		default:
			return unsupported("%s --%s is not supported", i.word, key)
		}
	}
	if len(words) > 0 && strings.HasPrefix(words[0], "[") {
		_, rest := cutFlags(i.rest)
		var list []string
		if json.Unmarshal([]byte(rest), &list) == nil {
			words, s.Raw = list, false
		}
	}
	if len(words) < 2 {
		return invalid("%s wants at least one source and a destination", i.word)
	}
	for _, source := range words[:len(words)-1] {
		if strings.Contains(source, "://") || strings.HasPrefix(source, "git@") {
			return unsupported("%s of a URL is not supported: fetch it with RUN", i.word)
		}
	}
	s.Args = words
	return nil
}

// pairs reads KEY=value words, or the older form KEY value.
func (i instruction) pairs(s *Step) error {
	_, words, err := i.words()
	if err != nil {
		return err
	}
	if len(words) == 0 {
		return invalid("%s wants KEY=value", i.word)
	}
	if !strings.Contains(words[0], "=") {
		if len(words) < 2 {
			return invalid("%s wants KEY=value", i.word)
		}
		s.Args = []string{words[0] + "=" + strings.TrimSpace(strings.TrimPrefix(i.rest, words[0]))}
		return nil
	}
	for _, w := range words {
		if key, _, ok := strings.Cut(w, "="); !ok || key == "" {
			return invalid("%s: %q is not of the form KEY=value", i.word, w)
		}
	}
	s.Args = words
	return nil
}

func (i instruction) plain(s *Step, least, most int) error {
	_, words, err := i.words()
	if err != nil {
		return err
	}
	if len(words) < least || len(words) > most {
		return invalid("%s wants %d argument, not %d", i.word, least, len(words))
	}
	s.Args = words
	return nil
}

// words splits the rest into --flags in front and words, quotes kept.
func (i instruction) words() (flags map[string]string, words []string, err error) {
	given, rest := cutFlags(i.rest)
	flags = map[string]string{}
	for _, f := range given {
		key, value, _ := strings.Cut(strings.TrimPrefix(f, "--"), "=")
		flags[key] = value
	}
	words, err = splitWords(rest)
	return flags, words, err
}

func cutFlags(text string) (flags []string, rest string) {
	for strings.HasPrefix(text, "--") {
		flag, after, _ := strings.Cut(text, " ")
		flags = append(flags, flag)
		text = strings.TrimSpace(after)
	}
	return flags, text
}
