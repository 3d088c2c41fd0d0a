package house

import (
	"fmt"
	"slices"
	"strings"
)

// everythingAbove, in the third column of the table, allows all rows above.
const everythingAbove = "everything above"

// A Row is one line of the package table.
type Row struct {
	Name string   // a folder, or "folder/..." for the folder and all below it
	May  []string // names of rows that its packages may import; nil for none
	All  bool     // may import every row above
}

// covers reports whether the row speaks of the package in dir.
func (r Row) covers(dir string) bool {
	base, deep := strings.CutSuffix(r.Name, "/...")
	return dir == base || deep && strings.HasPrefix(dir, base+"/")
}

// A Table is the package table, top to bottom.
type Table []Row

// ParseTable reads the table headed "package | purpose | may import" from a
// Markdown text. It fails when there is none, when a row is malformed, and when a row
// names one that does not stand above it: so the table has no cycles.
func ParseTable(markdown string) (Table, error) {
	var table Table
	for _, cells := range rows(markdown, "package", "purpose", "may import") {
		row := Row{Name: cells[0]}
		if cells[2] == everythingAbove {
			row.All = true
		} else {
			row.May = strings.Fields(cells[2])
		}
		for _, name := range row.May {
			if !slices.ContainsFunc(table, func(above Row) bool { return above.Name == name }) {
				return nil, fmt.Errorf("row %s: %s is not a row above it", row.Name, name)
			}
		}
		if slices.ContainsFunc(table, func(above Row) bool { return above.Name == row.Name }) {
			return nil, fmt.Errorf("row %s: stands twice", row.Name)
		}
		table = append(table, row)
	}
	if len(table) == 0 {
		return nil, fmt.Errorf("no table with the columns: package, purpose, may import")
	}
	return table, nil
}

// find returns the index of the row that speaks most closely of dir, or -1: the
// row of just this folder, else that of the nearest folder above.
func (t Table) find(dir string) int {
	best := -1
	for i, row := range t {
		if row.Name == dir {
			return i
		}
		if row.covers(dir) && (best < 0 || len(row.Name) > len(t[best].Name)) {
			best = i
		}
	}
	return best
}

// allows reports whether packages of row from may import packages of row to.
func (t Table) allows(from, to int) bool {
	return from == to || t[from].All && to < from || slices.Contains(t[from].May, t[to].Name)
}

// rows returns the cells of the first Markdown table with the given header,
// without the code marks around names. Rows of another width are left out.
func rows(markdown string, header ...string) [][]string {
	var found [][]string
	inside := false
	for line := range strings.Lines(markdown) {
		cells := Cells(line)
		switch {
		case !inside:
			inside = slices.Equal(cells, header)
		case cells == nil:
			return found
		case len(cells) == len(header) && strings.Trim(cells[0], "-:") != "":
			found = append(found, cells)
		}
	}
	return found
}

// Cells returns the cells of one line of a Markdown table, trimmed and without code
// marks, or nil when the line is none.
func Cells(line string) []string {
	line = strings.TrimSpace(line)
	if !strings.HasPrefix(line, "|") || !strings.HasSuffix(line, "|") {
		return nil
	}
	cells := strings.Split(strings.Trim(line, "|"), "|")
	for i := range cells {
		cells[i] = strings.ReplaceAll(strings.TrimSpace(cells[i]), "`", "")
	}
	return cells
}
