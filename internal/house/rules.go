package house

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// MaxLines is how long a file may be that a person wrote. Longer ones hold more
// than one idea.
const MaxLines = 700

// vague are package names that say nothing of what is inside.
var vague = []string{"util", "utils", "common", "helper", "helpers", "manager", "misc", "lib"}

// Imports returns where tree and table differ: a package without a row, a row
// without a package, an import that its row does not allow.
func Imports(tree Tree, table Table) []string {
	var problems []string
	used := make([]bool, len(table))
	for _, p := range tree.Packages {
		from := table.find(p.Dir)
		if from < 0 {
			problems = append(problems, fmt.Sprintf("package %s has no row in the table", p.Dir))
			continue
		}
		used[from] = true
		for _, imp := range p.Imports {
			dir, ours := strings.CutPrefix(imp.Path, tree.Module+"/")
			if !ours {
				continue
			}
			to := table.find(dir)
			if to >= 0 && !table.allows(from, to) {
				problems = append(problems, fmt.Sprintf("%s: package %s may not import %s", imp.File, p.Dir, dir))
			}
		}
	}
	for i, row := range table {
		if !used[i] {
			problems = append(problems, fmt.Sprintf("row %s has no package", row.Name))
		}
	}
	return problems
}

// Shape returns the packages and files that break the rules of size, name and
// comment.
func Shape(tree Tree) []string {
	var problems []string
	for _, p := range tree.Packages {
		if slices.Contains(vague, path.Base(p.Dir)) || slices.Contains(vague, p.Name) {
			problems = append(problems, fmt.Sprintf("package %s: the name says nothing of what is inside", p.Dir))
		}
		opening := "Package " + p.Name + " "
		if p.Name == "main" {
			opening = "Command " + path.Base(p.Dir) + " "
		}
		written := slices.ContainsFunc(p.Files, func(f File) bool { return !f.Generated })
		if !p.TestsOnly && written && !strings.HasPrefix(p.Doc, opening) {
			problems = append(problems, fmt.Sprintf("package %s: no package comment that begins with %q", p.Dir, opening))
		}
		for _, f := range p.Files {
			if f.Lines > MaxLines && !f.Generated {
				problems = append(problems, fmt.Sprintf("%s has %d lines, more than %d", f.Path, f.Lines, MaxLines))
			}
		}
	}
	return problems
}

// Modules returns where the tree and the list of dependencies differ, which is
// the table headed "module | why" of a Markdown text: every module of others that
// our code imports has one line there, with its reason, and no other has.
// Modules that only tests import are listed by choice.
func Modules(tree Tree, markdown string) []string {
	listed := map[string]bool{}
	var problems []string
	for _, cells := range rows(markdown, "module", "why") {
		if listed[cells[0]] {
			problems = append(problems, fmt.Sprintf("module %s is listed twice", cells[0]))
		}
		if cells[1] == "" {
			problems = append(problems, fmt.Sprintf("module %s is listed without a reason", cells[0]))
		}
		listed[cells[0]] = true
	}
	missing := map[string]bool{}
	for _, p := range tree.Packages {
		for _, imp := range p.Imports {
			if module := tree.moduleOf(imp.Path); module != "" && !listed[module] && !missing[module] {
				missing[module] = true
				problems = append(problems, fmt.Sprintf("%s: module %s is not listed", imp.File, module))
			}
		}
	}
	for module := range listed {
		if !slices.Contains(tree.Requires, module) {
			problems = append(problems, fmt.Sprintf("module %s is listed and not required", module))
		}
	}
	slices.Sort(problems)
	return problems
}

// moduleOf returns the required module that provides an import path; empty for
// the standard library and for our own packages.
func (t Tree) moduleOf(importPath string) string {
	best := ""
	for _, module := range t.Requires {
		if (importPath == module || strings.HasPrefix(importPath, module+"/")) && len(module) > len(best) {
			best = module
		}
	}
	return best
}
