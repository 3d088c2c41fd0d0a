package machine_test

import (
	"strings"
	"testing"

	"github.com/atoll-run/atoll/internal/machine"
)

func TestDescribeNamesWhatFiguresDependOn(t *testing.T) {
	line := machine.Describe()
	for _, part := range []string{" cores", " GiB", "Linux "} {
		if !strings.Contains(line, part) {
			t.Errorf("%q does not say %q", line, part)
		}
	}
	if strings.ContainsAny(line, "\n|") {
		t.Errorf("%q does not fit a cell of a table", line)
	}
}
