// Package modeltest gives tests small models that exist.
package modeltest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// unreachable is how scripts/models says that a package registry does not answer.
const unreachable = 75

// Path returns where a file is that scripts/models knows, e.g.
// "smollm2-135m-instruct-q4_1.gguf", and fetches it if it is not there yet. The test
// is skipped when no package registry can be reached, and only then.
func Path(t testing.TB, name string) string {
	t.Helper()
	if cache, err := os.UserCacheDir(); err == nil {
		path := filepath.Join(cache, "atoll", "models", filepath.FromSlash(name))
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	_, self, _, _ := runtime.Caller(0)
	script := filepath.Join(filepath.Dir(self), "..", "..", "scripts", "models")
	var stderr bytes.Buffer
	cmd := exec.Command(script, name)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == unreachable {
		t.Skipf("no package registry can be reached for %s: %s", name, stderr.String())
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", script, name, err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}
