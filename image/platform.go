package image

import (
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// choosePlatform picks an index's entry for a platform. An entry that does not
// say what it is for is taken when it is the only one.
func choosePlatform(index v1.IndexManifest, platform string) (v1.Descriptor, error) {
	want, err := v1.ParsePlatform(platform)
	if err != nil {
		return v1.Descriptor{}, err
	}
	var have []string
	for _, d := range index.Manifests {
		if d.Platform == nil {
			if len(index.Manifests) == 1 {
				return d, nil
			}
			continue
		}
		if d.Platform.Satisfies(*want) {
			return d, nil
		}
		if d.Platform.OS != "unknown" { // attestations
			have = append(have, d.Platform.String())
		}
	}
	return v1.Descriptor{}, fmt.Errorf("no image for platform %s, only for %s", platform, strings.Join(have, ", "))
}
