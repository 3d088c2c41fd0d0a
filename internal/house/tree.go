// Package house holds the source tree to the rules that ARCHITECTURE.md lays
// down: which package may import which, how things are named and how large they
// may grow, and that every module we lean on is accounted for.
package house

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// A Package is one folder of Go files.
type Package struct {
	Dir       string   // slash-separated, relative to the module root; "." for the root itself
	Name      string   // from the package clause, without "_test"
	Doc       string   // the package comment; empty when there is none
	Imports   []Import // of files that are not tests; sorted, each path once
	Files     []File
	TestsOnly bool // holds nothing but tests
}

// An Import is one import of a package and the file that has it.
type Import struct {
	Path string // as written in the source
	File string // the first file, by name, that has it
}

// A File is one Go file.
type File struct {
	Path      string // relative to the module root
	Lines     int
	Generated bool // carries the "Code generated" mark
}

// A Tree is every package of a module.
type Tree struct {
	Module   string // the module path
	Requires []string
	Packages []Package // sorted by Dir
}

// skipped are folders that hold no source of ours.
var skipped = []string{"bin", "build", "coverage", "node_modules", "testdata"}

// Load parses the Go files of the module whose root is fsys. It fails when a
// file cannot be read or parsed.
func Load(fsys fs.FS) (Tree, error) {
	var tree Tree
	mod, err := fs.ReadFile(fsys, "go.mod")
	if err != nil {
		return tree, fmt.Errorf("read the module file: %w", err)
	}
	tree.Module, tree.Requires = parseModule(mod)
	found := map[string]*Package{}
	err = fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			hidden := strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "_")
			if p != "." && (hidden || slices.Contains(skipped, d.Name())) {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(p) != ".go" {
			return nil
		}
		src, err := fs.ReadFile(fsys, p)
		if err != nil {
			return err
		}
		dir := path.Dir(p)
		if found[dir] == nil {
			found[dir] = &Package{Dir: dir, TestsOnly: true}
		}
		return found[dir].add(p, src)
	})
	if err != nil {
		return tree, err
	}
	for _, p := range found {
		slices.SortFunc(p.Imports, func(a, b Import) int { return strings.Compare(a.Path, b.Path) })
		tree.Packages = append(tree.Packages, *p)
	}
	slices.SortFunc(tree.Packages, func(a, b Package) int { return strings.Compare(a.Dir, b.Dir) })
	return tree, nil
}

// add parses one file into the package. Files come in the order of their names.
func (p *Package) add(name string, src []byte) error {
	f, err := parser.ParseFile(token.NewFileSet(), name, src, parser.ImportsOnly|parser.ParseComments)
	if err != nil {
		return err
	}
	p.Files = append(p.Files, File{
		Path:      name,
		Lines:     bytes.Count(src, []byte("\n")),
		Generated: ast.IsGenerated(f),
	})
	if p.Name == "" {
		p.Name = strings.TrimSuffix(f.Name.Name, "_test")
	}
	if strings.HasSuffix(name, "_test.go") {
		return nil
	}
	p.TestsOnly = false
	p.Name = f.Name.Name
	if p.Doc == "" && f.Doc != nil {
		p.Doc = f.Doc.Text()
	}
	for _, spec := range f.Imports {
		imp := Import{Path: strings.Trim(spec.Path.Value, "\"`"), File: name}
		if !slices.ContainsFunc(p.Imports, func(have Import) bool { return have.Path == imp.Path }) {
			p.Imports = append(p.Imports, imp)
		}
	}
	return nil
}

// parseModule reads the module path and the paths of all required modules.
func parseModule(mod []byte) (module string, requires []string) {
	inBlock := false
	for line := range strings.Lines(string(mod)) {
		line, _, _ = strings.Cut(line, "//")
		words := strings.Fields(line)
		switch {
		case len(words) == 2 && words[0] == "module":
			module = words[1]
		case len(words) == 2 && words[0] == "require" && words[1] == "(":
			inBlock = true
		case len(words) == 1 && words[0] == ")":
			inBlock = false
		case len(words) == 3 && words[0] == "require":
			requires = append(requires, words[1])
		case len(words) == 2 && inBlock:
			requires = append(requires, words[0])
		}
	}
	return module, requires
}
