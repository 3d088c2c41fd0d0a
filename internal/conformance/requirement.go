package main

import (
	"fmt"
	"strings"

	"github.com/atoll-run/atoll/internal/house"
)

// A requirement is one row of docs/requirements.md.
type requirement struct {
	section string // the heading it stands under
	id      string
	text    string
	remains string // what keeps it from being proven whole; may be empty
}

// notHere begins a requirement's remains when the machine at hand is what lacks.
const notHere = "not here: "

// parseRequirements reads the tables of docs/requirements.md in their order.
func parseRequirements(markdown string) ([]requirement, error) {
	var all []requirement
	section := ""
	seen := map[string]bool{}
	for line := range strings.Lines(markdown) {
		if title, ok := strings.CutPrefix(line, "## "); ok {
			section = strings.TrimSpace(title)
			continue
		}
		cells := house.Cells(line)
		if len(cells) != 3 || cells[0] == "id" || strings.Trim(cells[0], "-") == "" {
			continue
		}
		r := requirement{section: section, id: cells[0], text: cells[1], remains: cells[2]}
		if seen[r.id] || r.text == "" || section == "" {
			return nil, fmt.Errorf("requirement %s: stands twice, or without a text or a heading", r.id)
		}
		seen[r.id] = true
		all = append(all, r)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no requirements found")
	}
	return all, nil
}
