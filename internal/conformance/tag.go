package main

import (
	"bufio"
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

// mark begins the comment that says which requirements a test proves.
const mark = "conformance:"

// A testID names a test: the folder of its package and its name. A script below
// test/ is a subtest of TestScripts; files that a script runs count for all
// scripts of their folder.
type testID struct {
	dir  string // relative to the module root
	name string // "TestX", "TestScripts/dir/file" or "TestScripts/dir"
}

func (t testID) String() string { return t.dir + "." + t.name }

func compareTests(a, b testID) int {
	if a.dir != b.dir {
		return strings.Compare(a.dir, b.dir)
	}
	return strings.Compare(a.name, b.name)
}

// tags maps the id of a requirement to the tests that say they prove it, sorted.
type tags map[string][]testID

func (t tags) add(test testID, ids []string) {
	for _, id := range ids {
		t[id] = append(t[id], test)
	}
}

// tests returns every tagged test once, sorted.
func (t tags) tests() []testID {
	var all []testID
	for _, tests := range t {
		all = append(all, tests...)
	}
	slices.SortFunc(all, compareTests)
	return slices.Compact(all)
}

// collect reads the tags of all tests and scripts of the module at fsys. It fails
// on a tag that stands above something else than a test.
func collect(fsys fs.FS) (tags, error) {
	found := tags{}
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p != "." && (strings.HasPrefix(d.Name(), ".") || slices.Contains([]string{"node_modules", "testdata", "build", "bin"}, d.Name())) {
				return fs.SkipDir
			}
			return nil
		}
		script := scriptOf(p, d)
		if path.Ext(p) != ".go" && script == "" {
			return nil
		}
		src, err := fs.ReadFile(fsys, p)
		if err != nil {
			return err
		}
		if script == "" {
			return found.addGo(p, src)
		}
		found.add(testID{"test", "TestScripts/" + script}, scriptTags(src))
		return nil
	})
	for id := range found {
		slices.SortFunc(found[id], compareTests)
	}
	return found, err
}

// scriptOf returns what of TestScripts runs a file: "dir/file" when it is one of the
// scripts, "dir" when it lies below their folder, and nothing for other files.
func scriptOf(p string, d fs.DirEntry) string {
	p, below := strings.CutPrefix(p, "test/")
	dir, rest, deep := strings.Cut(p, "/")
	if !below || !deep || !d.Type().IsRegular() || !slices.Contains([]string{"", ".sh", ".py", ".js", ".cjs", ".mjs", ".ts"}, path.Ext(p)) {
		return ""
	}
	info, err := d.Info()
	if err == nil && info.Mode()&0o111 != 0 && !strings.Contains(rest, "/") && !strings.HasPrefix(rest, "_") {
		return p
	}
	return dir
}

// addGo adds the tags of one Go file.
func (t tags) addGo(name string, src []byte) error {
	if !bytes.Contains(src, []byte("// "+mark)) {
		return nil
	}
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, src, parser.ParseComments)
	if err != nil {
		return err
	}
	above := map[*ast.CommentGroup]string{}
	for _, decl := range f.Decls {
		if fn, ok := decl.(*ast.FuncDecl); ok && fn.Doc != nil && fn.Recv == nil {
			above[fn.Doc] = fn.Name.Name
		}
	}
	for _, group := range f.Comments {
		for _, c := range group.List {
			ids, ok := strings.CutPrefix(c.Text, "// "+mark)
			if !ok {
				continue
			}
			test := above[group]
			if !strings.HasSuffix(name, "_test.go") || !strings.HasPrefix(test, "Test") {
				return fmt.Errorf("%s: a conformance tag that is not above a test", fset.Position(c.Pos()))
			}
			t.add(testID{path.Dir(name), test}, strings.Fields(ids))
		}
	}
	return nil
}

// scriptTags returns the ids in the tag lines among the first 40 lines of a script.
func scriptTags(src []byte) []string {
	var ids []string
	lines := bufio.NewScanner(bytes.NewReader(src))
	for n := 0; n < 40 && lines.Scan(); n++ {
		if rest, ok := strings.CutPrefix(strings.TrimLeft(lines.Text(), "/#* "), mark); ok {
			ids = append(ids, strings.Fields(rest)...)
		}
	}
	return ids
}
