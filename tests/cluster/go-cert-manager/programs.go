//go:build programs

// Package programs names the programs that build-cert-manager builds, for go.mod.
package programs

import (
	_ "github.com/cert-manager/cert-manager/cmd/cainjector"
	_ "github.com/cert-manager/cert-manager/cmd/controller"
)
