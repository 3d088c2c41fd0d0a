package server

import (
	"errors"
	"os"
	"path/filepath"
)

// identityDir is where programs look for what sandbox they are in, those too
// that do not get the variables, such as services started at boot.
const identityDir = "/run/e2b"

// identityNames are the variables that are left there as files.
var identityNames = []string{"E2B_SANDBOX", "E2B_SANDBOX_ID", "E2B_TEMPLATE_ID"}

// leaveIdentity writes the variables that are set into files named after them,
// with a dot before the name.
func leaveIdentity(dir string, env map[string]string) error {
	var errs []error
	for _, name := range identityNames {
		value, ok := env[name]
		if !ok {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		errs = append(errs, os.WriteFile(filepath.Join(dir, "."+name), []byte(value), 0o644))
	}
	return errors.Join(errs...)
}
